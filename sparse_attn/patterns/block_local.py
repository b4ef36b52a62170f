"""Causal block-local attention: a query sees its own block and some whole blocks before it."""

import dataclasses
from collections.abc import Collection
from typing import ClassVar

from sparse_attn.patterns import base, causal, per_layer


@dataclasses.dataclass(frozen=True)
class BlockLocal(base.Pattern):
    """Earlier tokens of the query's block, and the `before` blocks in front of it.

    The sparse layers of MASFormer  [arXiv:2310.12442, sec. 3]. A query sees between
    `before * size + 1` and `(before + 1) * size` keys; `before=0` is `chunked(size)`.

    Attributes:
      size: tokens of a block.
      before: whole blocks that are seen before the query's own.

    Raises:
      ValueError: a field is not in its range.

    >>> import numpy as np
    >>> BlockLocal(size=2).mask_fn(np.arange(6)[:, None], np.arange(6)).astype(int)
    array([[1, 0, 0, 0, 0, 0],
           [1, 1, 0, 0, 0, 0],
           [1, 1, 1, 0, 0, 0],
           [1, 1, 1, 1, 0, 0],
           [0, 0, 1, 1, 1, 0],
           [0, 0, 1, 1, 1, 1]])
    """

    size: int
    before: int = 1

    block_state_exact: ClassVar[bool] = True

    def __post_init__(self):
        base.check_int("size", self.size)
        base.check_int("before", self.before, least=0)

    def mask_fn(self, q_pos, kv_pos):
        near = q_pos // self.size - kv_pos // self.size <= self.before
        return near & (kv_pos <= q_pos)

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        q_first, q_last = q_lo // self.size, (q_hi - 1) // self.size
        kv_first, kv_last = kv_lo // self.size, (kv_hi - 1) // self.size
        return base.state_of(
            empty=(kv_lo > q_hi - 1) | (q_first - kv_last > self.before),
            full=(kv_hi - 1 <= q_lo) & (q_last - kv_first <= self.before),
        )

    @property
    def causal(self) -> bool:
        return True


def mixed_spans(
    size: int, num_layers: int, *, full_layers: Collection[int], before: int = 1
) -> per_layer.PerLayer:
    """MASFormer's schedule: full attention in `full_layers`, block-local in the others.

    [arXiv:2310.12442, sec. 3].

    Args:
      size, before: of the block-local layers, as in `BlockLocal`.
      num_layers: layers of the model.
      full_layers: layers with full causal attention, counted from 0 at the input.

    Raises:
      ValueError: an argument is not in its range.

    >>> mixed_spans(1024, 3, full_layers=[0]).expression()  # doctest: +NORMALIZE_WHITESPACE
    'per_layer(patterns=(causal(), block_local(size=1024), block_local(size=1024)))'
    """
    base.check_int("num_layers", num_layers)
    if strange := sorted(set(full_layers) - set(range(num_layers))):
        raise ValueError(f"full_layers={strange} must be in [0, num_layers={num_layers})")
    local = BlockLocal(size=size, before=before)
    return per_layer.PerLayer(
        tuple(causal.Causal() if i in full_layers else local for i in range(num_layers))
    )


EXAMPLES = (
    BlockLocal(size=5),
    BlockLocal(size=1, before=2),
    BlockLocal(size=24, before=3),
    BlockLocal(size=7, before=0),
)
