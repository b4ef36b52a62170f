"""Two classes of heads: retrieval heads see everything, streaming heads sinks and a window."""

import dataclasses

from sparse_attn.patterns import base, causal, local, per_head, sinks


@dataclasses.dataclass(frozen=True)
class RetrievalHeads(per_head.PerHead):
    """Full causal attention in retrieval heads; in the others the first and the latest tokens.

    The masks of DuoAttention  [arXiv:2410.10819, sec. 2] and RazorAttention  [arXiv:2407.15891,
    sec. 3]; one entry per KV head, so that the cache of a streaming head holds
    `sink_tokens + window` tokens at most. One per layer: `PerLayer` of these. How heads are
    classed, and RazorAttention's token that compensates for the dropped ones, are not masks.

    Attributes:
      retrieval: for each KV head, whether it is a retrieval head.
      window: tokens one query of a streaming head sees, itself included.
      sink_tokens: tokens at the start that streaming heads see; None = none.
      queries_per_kv: query heads that share a KV head, and its class.
      patterns: the pattern of each query head, made from the above.

    Raises:
      ValueError: `retrieval` is empty or holds something else than bools, or a number is not in
        its range.

    >>> heads = RetrievalHeads((True, False), window=8, sink_tokens=2, queries_per_kv=2)
    >>> [p.expression() for p in heads.patterns[1:3]]
    ['causal()', '(local(window=8) | sinks(tokens=2))']
    """

    patterns: tuple[base.Pattern, ...] = dataclasses.field(init=False, repr=False, compare=False)
    retrieval: tuple[bool, ...]
    window: int
    sink_tokens: int | None = None
    queries_per_kv: int = 1

    def __post_init__(self):
        object.__setattr__(self, "retrieval", tuple(self.retrieval))
        if not self.retrieval or not all(isinstance(x, bool) for x in self.retrieval):
            raise ValueError(f"retrieval={self.retrieval!r} must be True or False per KV head")
        base.check_int("queries_per_kv", self.queries_per_kv)
        streaming = local.Local(window=self.window)
        if self.sink_tokens is not None:
            streaming = streaming | sinks.Sinks(tokens=self.sink_tokens)
        kinds = (causal.Causal() if full else streaming for full in self.retrieval)
        patterns = tuple(kind for kind in kinds for _ in range(self.queries_per_kv))
        object.__setattr__(self, "patterns", patterns)

    def expression(self) -> str:
        fields = (f for f in dataclasses.fields(self) if f.init)
        given = (f"{f.name}={getattr(self, f.name)!r}" for f in fields)
        return f"retrieval_heads({', '.join(given)})"


EXAMPLES = (
    RetrievalHeads((True, False, False), window=6, sink_tokens=2),
    RetrievalHeads((False, True), window=9, queries_per_kv=2),
)
