"""One pattern per query head."""

import dataclasses

from sparse_attn.patterns import base


@dataclasses.dataclass(frozen=True)
class PerHead(base.Expression):
    """A pattern for each query head, cycled when there are more heads than patterns.

    Pass it as `mask=` to `attend`, or as a layer's pattern. Heads with equal patterns share their
    block tables.

    Raises:
      ValueError: empty, or an element is not a `Pattern`.

    >>> from sparse_attn.patterns import causal, local
    >>> PerHead((local.Local(window=2), causal.Causal())).for_head(3)
    Causal()
    """

    patterns: tuple[base.Pattern, ...]

    def __post_init__(self):
        object.__setattr__(self, "patterns", tuple(self.patterns))
        if not self.patterns or not all(isinstance(p, base.Pattern) for p in self.patterns):
            raise ValueError(f"patterns={self.patterns!r} must be one or more patterns")

    def for_head(self, head: int) -> base.Pattern:
        """The pattern of query head `head`."""
        return self.patterns[head % len(self.patterns)]

    def for_heads(self, num_heads: int) -> tuple[base.Pattern, ...]:
        """The patterns of all heads; `num_heads` must be a multiple of their number.

        Raises:
          ValueError: `num_heads` is not a multiple of the number of patterns.
        """
        if num_heads % len(self.patterns):
            raise ValueError(
                f"num_heads={num_heads} must be a multiple of the {len(self.patterns)} patterns"
            )
        return tuple(self.for_head(h) for h in range(num_heads))

    @property
    def causal(self) -> bool:
        """True when every head is causal."""
        return all(p.causal for p in self.patterns)


def _examples():
    from sparse_attn.patterns import causal, local, sinks

    window = local.Local(window=5)
    return (
        PerHead((causal.Causal(), window)),
        PerHead((window | sinks.Sinks(tokens=2), causal.Causal(), window)),
    )


EXAMPLES = _examples()
