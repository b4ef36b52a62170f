"""A causal window that grows with the length of the sequence, by a rule of its own per head."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from sparse_attn.patterns import base, local, per_head, per_layer, sinks


@dataclasses.dataclass(frozen=True)
class ElasticWindow(base.Pattern):
    """A window of `alpha + beta * length` tokens, the query included.  [arXiv:2406.14909]

    Rounded and kept in `[1, length]`. `beta=0` is a window of fixed size, and `alpha=0,
    beta=1` full causal attention. The rule belongs to the model, the length to the sequence:
    `at_length` makes the pattern of another length.

    Attributes:
      alpha: tokens; may be negative.
      beta: fraction of the length, in `[0, 1]`.
      length: tokens of the sequence.

    Raises:
      ValueError: a field is not in its range.

    >>> ElasticWindow(alpha=64, beta=0.25, length=1024).window
    320
    """

    alpha: int
    beta: float
    length: int

    block_state_exact: ClassVar[bool] = True

    def __post_init__(self):
        base.check_int("alpha", self.alpha, least=-(2**31))
        if not isinstance(self.beta, (int, float)) or not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta!r} must be a number in [0, 1]")
        object.__setattr__(self, "beta", float(self.beta))
        base.check_int("length", self.length)

    @property
    def window(self) -> int:
        """Tokens that one query sees."""
        span = self.alpha + round(self.beta * self.length)
        return min(max(span, 1), self.length)

    @property
    def _local(self) -> local.Local:
        return local.Local(window=self.window)

    def mask_fn(self, q_pos, kv_pos):
        return self._local.mask_fn(q_pos, kv_pos)

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        return self._local.block_state(q_lo, q_hi, kv_lo, kv_hi)

    @property
    def causal(self) -> bool:
        return True


def heads(
    rules: Sequence[tuple[int, float]], *, length: int, sink_tokens: int | None = None
) -> per_head.PerHead:
    """MoA's heads: a window by one rule (alpha, beta) per head, and the first tokens.

    [arXiv:2406.14909]. Which rule suits which head is found on calibration data: an
    offline search over gradients, not part of the pattern.

    Args:
      rules: (alpha, beta) of each query head.
      length: tokens of the sequence.
      sink_tokens: tokens at the start that all later ones see; None = none.

    Raises:
      ValueError: no rule, or a number is not in its range.

    >>> [p.a.window for p in heads([(64, 0.0), (0, 0.5)], length=512, sink_tokens=4).patterns]
    [64, 256]
    """
    windows = tuple(ElasticWindow(alpha, beta, length) for alpha, beta in rules)
    if sink_tokens is not None:
        windows = tuple(w | sinks.Sinks(tokens=sink_tokens) for w in windows)
    return per_head.PerHead(windows)


def at_length(pattern, length: int):
    """`pattern` for sequences of `length` tokens: the elastic windows in it grow or shrink.

    Enters `& | ~`, heads and layers; what is not elastic stays.

    >>> at_length(heads([(64, 0.0), (0, 0.5)], length=512), 4096).patterns[1].window
    2048
    """
    match pattern:
        case ElasticWindow():
            return dataclasses.replace(pattern, length=length)
        case per_head.PerHead(patterns=patterns) | per_layer.PerLayer(patterns=patterns):
            made = tuple(at_length(p, length) for p in patterns)
            return pattern if made == patterns else type(pattern)(made)
        case base.And(a=a, b=b) | base.Or(a=a, b=b):
            return type(pattern)(at_length(a, length), at_length(b, length))
        case base.Not(a=a):
            return ~at_length(a, length)
    return pattern


EXAMPLES = (
    ElasticWindow(alpha=3, beta=0.25, length=50),
    ElasticWindow(alpha=-100, beta=0.5, length=64),
    ElasticWindow(alpha=0, beta=1.0, length=1 << 21),
)
