"""One pattern per layer."""

import dataclasses

from sparse_attn.patterns import base


@dataclasses.dataclass(frozen=True)
class PerLayer(base.Expression):
    """The attention schedule of a model: layer i uses entry i modulo the length.

    Entries are patterns, `PerHead`s or selectors (`selection/`). Five local layers and a global
    one, repeated [arXiv:2503.19786, sec. 2], is `PerLayer((local,) * 5 + (causal,))`.

    Raises:
      ValueError: empty, or an element is none of these.

    >>> from sparse_attn.patterns import causal, local
    >>> PerLayer((local.Local(window=2), causal.Causal())).for_layer(2)
    Local(window=2, reach=None)
    """

    patterns: tuple[base.Expression, ...]

    def __post_init__(self):
        object.__setattr__(self, "patterns", tuple(self.patterns))
        if not self.patterns or not all(
            isinstance(p, base.Expression) and not isinstance(p, PerLayer) for p in self.patterns
        ):
            raise ValueError(
                f"patterns={self.patterns!r} must be one or more patterns, PerHeads or selectors"
            )

    def for_layer(self, layer: int) -> base.Expression:
        """The entry of layer `layer`, counted from 0."""
        return self.patterns[layer % len(self.patterns)]

    @property
    def causal(self) -> bool:
        """True when every layer is causal."""
        return all(p.causal for p in self.patterns)


def _examples():
    from sparse_attn.patterns import causal, local

    return (PerLayer((local.Local(window=5), causal.Causal())),)


EXAMPLES = _examples()
