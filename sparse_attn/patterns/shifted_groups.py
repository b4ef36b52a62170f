"""Causal groups whose borders are moved, so that information crosses the borders of other heads."""

import dataclasses
from typing import ClassVar

from sparse_attn.patterns import base, chunked, per_head, sinks


@dataclasses.dataclass(frozen=True)
class ShiftedGroups(base.Pattern):
    """Earlier tokens of the query's group; the first group has `shift` tokens, the others `size`.

    The shifted half of shift-short attention [arXiv:2309.12307, sec. 3.2]. That one rolls the
    sequence, which puts its first and its last tokens in one group, where the first would see the
    future; here the sequence begins and ends with a smaller group instead, and nothing wraps.

    Attributes:
      size: tokens of a group.
      shift: tokens before the first border, in `[1, size]`; `size` is `chunked(size)`.

    Raises:
      ValueError: a field is not in its range.

    >>> import numpy as np
    >>> ShiftedGroups(size=3, shift=1).mask_fn(np.arange(5)[:, None], np.arange(5)).astype(int)
    array([[1, 0, 0, 0, 0],
           [0, 1, 0, 0, 0],
           [0, 1, 1, 0, 0],
           [0, 1, 1, 1, 0],
           [0, 0, 0, 0, 1]])
    """

    size: int
    shift: int

    block_state_exact: ClassVar[bool] = True

    def __post_init__(self):
        base.check_int("size", self.size)
        base.check_int("shift", self.shift, most=self.size)

    @property
    def _groups(self) -> chunked.Chunked:
        return chunked.Chunked(size=self.size)

    @property
    def _missing(self) -> int:
        return self.size - self.shift  # tokens that the first group lacks

    def mask_fn(self, q_pos, kv_pos):
        return self._groups.mask_fn(q_pos + self._missing, kv_pos + self._missing)

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        ranges = (x + self._missing for x in (q_lo, q_hi, kv_lo, kv_hi))
        return self._groups.block_state(*ranges)

    @property
    def causal(self) -> bool:
        return True


def heads(
    size: int,
    num_heads: int,
    *,
    shifted_heads: int | None = None,
    sink_tokens: int | None = None,
) -> per_head.PerHead:
    """LongLoRA's heads: groups in the first half, groups shifted by half a group in the second.

    [arXiv:2309.12307, sec. 3.2]. SinkLoRA returns part of the shifted heads to the plain groups
    and lets every group see the first tokens  [arXiv:2406.05678].

    Args:
      size: tokens of a group, at least 2.
      num_heads: query heads of the layer.
      shifted_heads: how many of them are shifted, the last ones; None = half.
      sink_tokens: tokens at the start that all later ones see; None = none.

    Raises:
      ValueError: an argument is not in its range.

    >>> heads(8, 2, sink_tokens=1).expression()  # doctest: +NORMALIZE_WHITESPACE
    'per_head(patterns=((chunked(size=8) | sinks(tokens=1)),
    (shifted_groups(size=8, shift=4) | sinks(tokens=1))))'
    """
    base.check_int("size", size, least=2)
    base.check_int("num_heads", num_heads)
    shifted = num_heads // 2 if shifted_heads is None else shifted_heads
    base.check_int("shifted_heads", shifted, least=0, most=num_heads)
    plain, moved = chunked.Chunked(size=size), ShiftedGroups(size=size, shift=size // 2)
    if sink_tokens is not None:
        plain, moved = (p | sinks.Sinks(tokens=sink_tokens) for p in (plain, moved))
    return per_head.PerHead((plain,) * (num_heads - shifted) + (moved,) * shifted)


EXAMPLES = (
    ShiftedGroups(size=8, shift=4),
    ShiftedGroups(size=5, shift=5),
    ShiftedGroups(size=64, shift=23),
)
