"""A prefix of other tokens (text, anchors, detection tokens) in front of a pattern."""

import dataclasses

from sparse_attn.patterns import base

_EVERYONE, _PREFIX = "everyone", "prefix"


@dataclasses.dataclass(frozen=True)
class Joint(base.Pattern):
    """`pattern` behind a prefix of `tokens` tokens that are seen by, and see, everyone.

    `pattern` judges positions counted from the end of the prefix, so a pattern on a grid keeps its
    coordinates. Text in front of an image [arXiv:2412.16112, sec. 3.2]; a low-resolution copy of it
    whose tokens are anchors for the windows of the full one [arXiv:2510.16325, sec. 3.2];
    detection tokens, which patches do not see [arXiv:2204.07962].

    Attributes:
      pattern: of the tokens after the prefix among themselves.
      tokens: length of the prefix.
      sees: what the prefix sees: "everyone", or the "prefix" alone.
      seen_by: who sees the prefix: "everyone", or the "prefix" alone.

    Raises:
      ValueError: a field is not in its range.

    >>> import numpy as np
    >>> from sparse_attn.patterns import chunked
    >>> pattern = Joint(chunked.Chunked(size=2, two_sided=True), tokens=1)
    >>> pattern.mask_fn(np.arange(5)[:, None], np.arange(5)).astype(int)
    array([[1, 1, 1, 1, 1],
           [1, 1, 1, 0, 0],
           [1, 1, 1, 0, 0],
           [1, 0, 0, 1, 1],
           [1, 0, 0, 1, 1]])
    """

    pattern: base.Pattern
    tokens: int
    sees: str = _EVERYONE
    seen_by: str = _EVERYONE

    def __post_init__(self):
        if not isinstance(self.pattern, base.Pattern):
            raise ValueError(f"pattern={self.pattern!r} must be a pattern")
        base.check_int("tokens", self.tokens)
        base.check_choice("sees", self.sees, (_EVERYONE, _PREFIX))
        base.check_choice("seen_by", self.seen_by, (_EVERYONE, _PREFIX))

    @property
    def block_state_exact(self) -> bool:
        return self.pattern.block_state_exact

    def mask_fn(self, q_pos, kv_pos):
        q_first, kv_first = q_pos < self.tokens, kv_pos < self.tokens
        q, kv = (base.greatest(x - self.tokens, 0) for x in (q_pos, kv_pos))
        visible = (q_first & kv_first) | (self.pattern.mask_fn(q, kv) & ~q_first & ~kv_first)
        if self.sees == _EVERYONE:
            visible = visible | (q_first & ~kv_first)
        if self.seen_by == _EVERYONE:
            visible = visible | (kv_first & ~q_first)
        return visible

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        def behind(lo, hi):
            low = base.greatest(lo - self.tokens, 0)
            return low, base.greatest(hi - self.tokens, low + 1)

        inner = self.pattern.block_state(*behind(q_lo, q_hi), *behind(kv_lo, kv_hi))
        q_first, kv_first = q_lo < self.tokens, kv_lo < self.tokens
        q_rest, kv_rest = q_hi > self.tokens, kv_hi > self.tokens
        rest, down, up = q_rest & kv_rest, q_first & kv_rest, q_rest & kv_first
        some = (q_first & kv_first) | (rest & (inner > base.EMPTY))
        hidden = rest & (inner < base.FULL)
        if self.sees == _EVERYONE:
            some = some | down
        else:
            hidden = hidden | down
        if self.seen_by == _EVERYONE:
            some = some | up
        else:
            hidden = hidden | up
        return base.state_of(1 - 1 * some, 1 - 1 * hidden)

    @property
    def causal(self) -> bool:
        return self.tokens == 1 and self.sees == _PREFIX and self.pattern.causal

    @property
    def may_be_empty(self) -> bool:
        return self.seen_by == _PREFIX and self.pattern.may_be_empty


def _examples():
    from sparse_attn.patterns import circular, local, swin

    return (
        Joint(circular.Circular(shape=(6, 7), radius=2), tokens=11),
        Joint(swin.Swin(shape=(8, 8), window_size=4), tokens=9, seen_by=_PREFIX),
        Joint(local.Local(window=5), tokens=1, sees=_PREFIX),
    )


EXAMPLES = _examples()
