"""Five kinds of attention, one small byte-level decoder, real text, minutes on two CPU cores.

    make quickstart
    python launch.py --config=configs/quickstart.py --sweep=patterns --workdir=runs/quickstart
    python launch.py --config=configs/quickstart.py:bigbird --workdir=runs/bigbird

The argument is a variant (full, local, sinks, bigbird, dilated) and a size (small, tiny), in any
order: `:local,tiny`. The runs differ in `model.pattern` and nothing else.
"""

import ml_collections

from configs import common
from sparse_attn.launch import sweep

PATTERNS = {
    "full": "causal()",
    "local": "local(window=64)",
    "sinks": "local(window=64) | sinks(tokens=4)",
    "bigbird": "causal() & (local(window=64) | global_tokens(tokens=16) "
    "| random_blocks(block=64, num_blocks=1, seed=0))",
    "dilated": "local(window=32) | dilated(window=32, dilation=8)",
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The run of one variant in one size."""
    chosen = common.parse_arg(arg, variant=tuple(PATTERNS), size=("small", "tiny"))
    config = common.base_config()
    config.name = chosen["variant"]
    config.model.pattern = PATTERNS[chosen["variant"]]
    config.model.block = 64  # Rows of 512 tokens: blocks of 128 would hide most of a pattern.
    return common.short_run(config, chosen["size"], tiny_steps=6)


def sweep_patterns():
    """One run per pattern."""
    yield from sweep.zipit(
        sweep.over("name", PATTERNS), sweep.over("model.pattern", PATTERNS.values())
    )
