"""A rule for each head, found once for a model and kept."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sparse_attn.ops import kept_mass
from sparse_attn.patterns import base as patterns_base
from sparse_attn.patterns import local, sinks
from sparse_attn.selection import base, pooled, vertical_slash

Rule = patterns_base.Pattern | base.Selector


@dataclasses.dataclass(frozen=True, kw_only=True)
class MInference(base.Selector):
    """Each query head follows a rule of its own, which `search` assigns.  [arXiv:2407.02490]

    The paper's three: the A-shape is a static pattern, `sinks(...) | local(...)`, at the
    granularity of blocks; the others are `vertical_slash` and `pooled` with a `top_k`. Any pattern
    or selector with the same blocks and `pattern` will do.

    Attributes:
      heads: a pattern or a selector for each query head, cycled when there are more heads.

    Raises:
      ValueError: `heads` is empty, or an entry is of another kind or has other blocks.

    >>> from sparse_attn.patterns import base as patterns_base
    >>> rule = patterns_base.parse(
    ...     "m_inference(heads=(local(window=64), pooled(top_k=8, block_q=64, block_kv=64)),"
    ...     " block_q=64, block_kv=64)", "sparse_attn.selection")
    >>> rule.for_head(3).top_k
    8
    """

    heads: tuple[Rule, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "heads", tuple(self.heads))
        if not self.heads or not all(isinstance(x, Rule) for x in self.heads):
            raise ValueError(f"heads={self.heads!r} must be one or more patterns or selectors")
        shared = ("block_q", "block_kv", "pattern")
        for rule in self.heads:
            for name in shared if isinstance(rule, base.Selector) else ():
                if getattr(rule, name) != getattr(self, name):
                    raise ValueError(
                        f"heads: {rule.expression()} must have {name}={getattr(self, name)}"
                    )
            if isinstance(rule, base.Selector) and rule.params_like(1, 1, 2):
                raise ValueError(f"heads: {rule.expression()} must have nothing to train")

    @property
    def looks_ahead(self) -> bool:
        """True when the rule of some head does."""
        return any(isinstance(x, base.Selector) and x.looks_ahead for x in self.heads)

    def for_head(self, head: int) -> Rule:
        """The rule of a query head."""
        return self.heads[head % len(self.heads)]

    def keep(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], blocks: base.Blocks
    ) -> Bool[Array, "B U nq nk"]:
        num_heads, group = q.shape[2], q.shape[2] // k.shape[2]
        by_rule: dict[Rule, list[int]] = {}
        for head in range(num_heads):
            by_rule.setdefault(self.for_head(head), []).append(head)
        kept, order = [], []
        for rule, heads in by_rule.items():
            at = np.array(heads)
            if isinstance(rule, base.Selector):
                part = self._kept_by(rule, q[:, :, at], k[:, :, at // group], blocks)
            else:
                part = self._states(q.shape[1], k.shape[1], rule) != patterns_base.EMPTY
            shape = (q.shape[0], len(heads), *blocks.candidates.shape[2:])
            kept.append(jnp.broadcast_to(part, shape))
            order += heads
        return jnp.concatenate(kept, 1)[:, np.argsort(order)]

    def _kept_by(self, rule, q, k, blocks):
        guard = rule._guard(q.shape[1], k.shape[1]) & blocks.candidates
        return rule.keep(q, k, blocks._replace(guard=guard)) | guard


def search(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    rules: Sequence[Rule],
    *,
    num_queries: int = 64,
) -> MInference:
    """The rule of each query head: the one that keeps most attention mass.  [sec. 3.2, alg. 1]

    Give rules of about the same cost, as the paper does: each keeps as many blocks as the others.
    Equals go to the earlier one. The first selector among them gives blocks and pattern.

    Args:
      q, k: of a model on representative text, concrete arrays.
      num_queries: queries, evenly spaced, on which the mass is measured.

    Raises:
      ValueError: there is no selector among the rules, or they do not fit each other.

    >>> import jax
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
    >>> few, many = (pooled.Pooled(block_q=16, block_kv=16, top_k=n) for n in (1, 3))
    >>> search(q, k, (few, many)).heads == (many, many)
    True
    """
    first = next((x for x in rules if isinstance(x, base.Selector)), None)
    if first is None:
        raise ValueError(f"rules={tuple(rules)!r} must have a selector among them")
    common = {name: getattr(first, name) for name in ("block_q", "block_kv", "pattern", "always")}
    masses = []
    for rule in rules:
        mask = MInference(heads=(rule,), **common).select(q, k)
        kept = kept_mass.kept_mass(q, k, mask, dense=first.pattern, num_queries=num_queries)
        masses.append(np.asarray(kept.mean((0, 1))))
    best = np.argmax(masses, axis=0)
    return MInference(heads=tuple(rules[i] for i in best), **common)


EXAMPLES = (
    MInference(
        block_q=16, block_kv=16,
        heads=(
            local.Local(window=20) | sinks.Sinks(tokens=4),
            pooled.Pooled(block_q=16, block_kv=16, top_k=1),
        ),
    ),
    MInference(
        block_q=16, block_kv=16,
        heads=(
            vertical_slash.VerticalSlash(block_q=16, block_kv=16, columns=2, diagonals=1),
            pooled.Pooled(block_q=16, block_kv=16, top_k=2, always=sinks.Sinks(tokens=1)),
        ),
    ),
)  # fmt: skip
