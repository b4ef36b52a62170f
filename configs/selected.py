"""Attention that chooses its keys: dense, mixture of blocks, native sparse attention, mixtures.

    python launch.py --config=configs/selected.py --sweep=methods --workdir=runs/selected
    python launch.py --config=configs/selected.py:nsa,tiny --workdir=runs/nsa

The argument is a method (dense, moba, nsa, alternating) and a size (small, tiny). `alternating` has
windows in one layer and native sparse attention in the next. `moba` has the parameters of `dense`,
so a checkpoint of either goes on as the other.
"""

import ml_collections

from configs import common
from sparse_attn.launch import sweep

NSA = "nsa(block_kv=32, top_k=4, window=64, compress_block=16, stride=8)"
METHODS = {
    "dense": "causal()",
    "moba": "moba(block_kv=32, top_k=3)",
    "nsa": NSA,
    "alternating": f"per_layer((local(window=64), {NSA}))",
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The run of one method in one size."""
    chosen = common.parse_arg(arg, method=tuple(METHODS), size=("small", "tiny"))
    config = common.base_config()
    config.name = chosen["method"]
    config.model.pattern = METHODS[chosen["method"]]
    return common.short_run(config, chosen["size"], tiny_steps=4)


def sweep_methods():
    """One run per method."""
    yield from sweep.zipit(
        sweep.over("name", METHODS), sweep.over("model.pattern", METHODS.values())
    )
