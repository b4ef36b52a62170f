"""FLOPs of a training step, from the masks and the shapes of the parameters, and what part of the
hardware's peak they use. XLA's cost analysis is not asked: it does not see into kernels.
"""

import dataclasses
import functools
import logging

from jaxtyping import PyTree

from sparse_attn.masks import stats
from sparse_attn.models import transformer
from sparse_attn.ops import tiles
from sparse_attn.selection import base as selection_base
from sparse_attn.train import digests, metrics

_LOG = logging.getLogger(__name__)

# Dense bfloat16 FLOP/s of one device by the start of its kind, from the vendors' data sheets.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA B200": 2250e12,
}


def peak(kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device of this kind; None when it is not in `PEAKS`.

    >>> peak("NVIDIA H200"), peak("TPU v5 lite"), peak("cpu")
    (989400000000000.0, 197000000000000.0, None)
    """
    return next((flops for start, flops in PEAKS.items() if kind.startswith(start)), None)


def attention_cost(
    config: transformer.LayersConfig, *, context: int, batch_size: int
) -> dict[str, float]:
    """Densities (means over layers) and attention FLOPs of one training step, from the masks.

    FLOPs are those of the products in forward and backward pass of all layers and rows, over
    visible pairs (`useful_flops`) and over active blocks (`executed_flops`). Boundaries of packed
    documents are not in the masks: pairs that they hide count as visible. A selector counts the
    most that it can keep.

    >>> config = transformer.TransformerConfig(vocab_size=64, num_layers=2, embed_dim=32)
    >>> attention_cost(config, context=128, batch_size=1)["token_density"]
    0.50390625
    """
    cost = dict.fromkeys(("token_density", "block_density", "useful_flops", "executed_flops"), 0.0)
    sizes = config.head_dim, config.num_heads
    for counted in layer_stats(config, context):
        cost["token_density"] += counted.token_density / config.num_layers
        cost["block_density"] += counted.block_density / config.num_layers
        for backward in (False, True):
            useful = counted.useful_flops(*sizes, backward=backward)
            executed = counted.executed_flops(*sizes, backward=backward)
            cost["useful_flops"] += batch_size * useful
            cost["executed_flops"] += batch_size * executed
    return cost


def matmul_params(params: PyTree) -> dict[str, int]:
    """Parameters that multiply every token: `layers` and `output`; a tied embedding counts once.

    >>> import jax.numpy as jnp
    >>> matmul_params({"embedding": jnp.zeros((8, 4)), "layers": {"up": {"kernel": jnp.zeros(9)}}})
    {'layers': 9, 'output': 32}
    """
    sizes = {name: x.size for name, x in digests.named(params).items()}
    output = sizes.get("output", sizes.get("embedding", 0))
    return {"layers": sum(n for k, n in sizes.items() if k.endswith("kernel")), "output": output}


@dataclasses.dataclass(frozen=True)
class Utilization:
    """What part of the peak a window of training used, as two fractions (MFU).

    `useful` counts tokens that are not padding and pairs that are visible; `executed` counts all
    positions, active blocks whole, and what is computed again because of `remat`. Both count 2
    FLOPs per multiply-add and the backward pass twice the forward pass (attention 2.5 times).

    Attributes:
      useful_per_token: FLOPs.
      executed_per_step: FLOPs.
      peak: FLOP/s of all devices together.
    """

    useful_per_token: float
    executed_per_step: float
    peak: float

    def of(self, window: metrics.Window) -> dict[str, float]:
        """`perf/mfu_useful` and `perf/mfu_executed` of a window; one above 1 is logged as a bug.

        >>> Utilization(1e9, 3e12, peak=1e13).of(metrics.Window(tokens=2000, steps=1, seconds=1.0))
        {'perf/mfu_useful': 0.2, 'perf/mfu_executed': 0.3}
        """
        useful = self.useful_per_token * window.tokens / window.seconds / self.peak
        executed = self.executed_per_step * window.steps / window.seconds / self.peak
        values = {"perf/mfu_useful": useful, "perf/mfu_executed": executed}
        for name, value in values.items():
            if value > 1:
                _LOG.error(
                    "%s is %.0f %% of the peak: this is a bug. The FLOP count, the peak in "
                    "sparse_attn/train/flops.py or the clock is wrong; do not use this number",
                    name,
                    100 * value,
                )
        return values


def utilization(
    config: transformer.LayersConfig,
    params: PyTree,
    *,
    context: int,
    batch_size: int,
    device_kind: str,
    num_devices: int,
) -> Utilization | None:
    """The FLOPs of a training step on such devices; None when their peak is not known."""
    one = peak(device_kind)
    if one is None:
        return None
    cost = attention_cost(config, context=context, batch_size=batch_size)
    tokens, weights = context * batch_size, matmul_params(params)
    forward = {name: 2.0 * size * tokens for name, size in weights.items()}
    executed = 3 * sum(forward.values()) + cost["executed_flops"]
    if config.remat == "block":
        executed += forward["layers"]
    if config.remat != "none":  # Kernels are no dots: attention is computed again.
        executed += batch_size * sum(
            counted.executed_flops(config.head_dim, config.num_heads)
            for counted in layer_stats(config, context)
        )
    useful = 3 * sum(forward.values()) + cost["useful_flops"]
    return Utilization(useful / tokens, executed, one * num_devices)


@functools.lru_cache(maxsize=8)  # Counting takes seconds for long contexts.
def layer_stats(config: transformer.LayersConfig, context: int) -> list[stats.MaskStats]:
    """Counts of the mask of each layer, as `attention_cost` takes them.

    >>> config = transformer.TransformerConfig(vocab_size=64, num_layers=2, embed_dim=32)
    >>> [counted.block_density for counted in layer_stats(config, 256)]
    [0.75, 0.75]
    """
    block = config.block or tiles.mask_block(context)
    counted = {}
    for pattern in config.layer_patterns():
        if isinstance(pattern, selection_base.Selector):
            counted[pattern] = stats.of(pattern.at_most(context))
        per_heads = (
            pattern.for_heads(config.num_heads) if hasattr(pattern, "for_heads") else pattern
        )
        if pattern not in counted:
            counted[pattern] = stats.of(per_heads, q_len=context, block_q=block, block_kv=block)
    return [counted[pattern] for pattern in config.layer_patterns()]
