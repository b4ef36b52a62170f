"""Keys on a grid, found from the last queries and moved together; and rules by modality."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import tiles
from sparse_attn.patterns import base as patterns_base
from sparse_attn.patterns import local, sinks
from sparse_attn.selection import base, pbs, vertical_slash

NEAR = local.Local(window=128) | sinks.Sinks(tokens=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmInference(pbs.Reordered):
    """The grid heads of MMInference: the keys `phase, phase + stride, ...` and those of `always`.

    [arXiv:2504.16083] In a video, columns of heavy keys repeat at the distance of a row or
    a frame. The last queries say, for each head, at which stride and phase; the keys there are
    moved to the front, where they fill 1 / stride of the blocks, and are seen by all queries,
    causally at their original positions. What `always` shows of the other keys joins exactly.
    Training-free, for prefill of one document; blocks are those that `attend` chooses. Heads of
    other kinds have other rules; `attend_by_modality` splits a row that mixes modalities.

    Attributes:
      strides: candidates, in tokens.
      always: what is seen beside the grid, token by token; None = nothing.
      probe: last queries whose attention to all keys is computed.

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
    >>> jax.eval_shape(MmInference(strides=(4, 16)).attend, q, k, v).shape
    (1, 64, 2, 8)
    """

    always: patterns_base.Pattern | None = NEAR
    strides: tuple[int, ...] = ()
    probe: int = 64

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "strides", tuple(self.strides))
        if not self.strides:
            raise ValueError("strides=() must be one or more ints >= 1")
        for stride in self.strides:
            patterns_base.check_int(f"each of strides={self.strides}", stride)
        patterns_base.check_int("probe", self.probe)
        self._check_fixed(block_q=128, block_kv=128, pattern=base.CAUSAL)

    @tiles.one_program
    def grid(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]
    ) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
        """The stride and the phase of each head.

        Those with most weight of the last queries above what evenly spread weight would have
        there; what `always` shows is not counted. Equals go to the earlier stride.
        """
        q, k = jax.lax.stop_gradient((q, k))
        shares = vertical_slash.probe(self, q, k, self.probe)
        if self.always is not None:
            q_pos = np.arange(q.shape[1] - shares.shape[2], q.shape[1], dtype=np.int32)[:, None]
            near = self.always.mask_fn(q_pos, np.arange(k.shape[1], dtype=np.int32)[None])
            shares = jnp.where(near, 0, shares)
        columns = shares.sum(2)
        length, total = k.shape[1], columns.sum(-1, keepdims=True)
        gains, places = [], []
        for stride in self.strides:
            padded = jnp.pad(columns, ((0, 0), (0, 0), (0, -length % stride)))
            mass = padded.reshape(*columns.shape[:2], -1, stride).sum(2)
            gains.append(mass - total / stride)
            places += [(stride, phase) for phase in range(stride)]
        best = jnp.argmax(jnp.concatenate(gains, -1), -1)
        strides, phases = jnp.asarray(np.array(places, np.int32).T)
        return strides[best], phases[best]

    @tiles.one_program
    def plan(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]
    ) -> tuple[Int[Array, "B N S"], Bool[Array, "B N S"]]:
        """The key at each place, those of the grid first, and which places are theirs."""
        stride, phase = (x[..., None] for x in self.grid(q, k))
        apart = (jnp.arange(k.shape[1], dtype=jnp.int32) - phase) % stride != 0
        order = jnp.argsort(apart, axis=-1, stable=True).astype(jnp.int32)
        return order, ~jnp.take_along_axis(apart, order, -1)

    @tiles.one_program
    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        *,
        return_lse: bool = False,
        impl: str | None = None,
    ) -> Any:
        """Finds the grid, moves its keys to the front, and attends; queries stay in place."""
        order, on_grid = self.plan(q, k)
        length, heads = q.shape[1], q.shape[2]
        keys = tuple(pbs.moved(x, order, heads) for x in (k, v))
        order, on_grid = (x.reshape(-1, x.shape[-1]) for x in (order, on_grid))
        places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (order.shape[0], length))

        def part(mask, seen):
            """Keys that are not `seen` are those of no document: their blocks are dropped."""
            ids = (jnp.ones_like(places), seen.astype(jnp.int32))
            return attend_lib.attend(
                pbs.fold(q), *keys, mask=mask, segment_ids=ids, positions=(places, order),
                return_lse=True, impl=impl,
            )  # fmt: skip

        out, lse = part(self.pattern, on_grid)
        if self.always is not None:
            near = part(self.always & self.pattern, ~on_grid)
            out, lse = attend_lib.merge_lse([(out, lse), near])
        out, lse = (pbs.unfold(x, q.shape[0]) for x in (out, lse))
        return (out, lse) if return_lse else out


@tiles.one_program
def attend_by_modality(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    *,
    kinds: Sequence[str],
    rules: Mapping[tuple[str, str], patterns_base.Pattern | base.Selector],
    return_lse: bool = False,
    impl: str | None = None,
) -> Any:
    """Every pair of modalities by a rule of its own: heads with a boundary in both dimensions.

    [arXiv:2504.16083] Queries and keys of a modality are brought together, so that blocks
    hold one modality whatever the row mixes; each pair runs as attention of its own, and the parts
    of a query join exactly. Give all pairs of a query's modality the same pattern for a boundary in
    the queries alone.

    Args:
      kinds: the modality of each token of the row, T names.
      rules: of (query's, key's) modality, causal by default. A pattern judges original positions. A
        selector sees the tokens of one modality as a sequence, so it takes a pair of equals.

    Raises:
      ValueError: lengths differ, a pair is unknown, or a selector is given for unequal modalities.

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 8))
    >>> kinds = ("text", "video", "video", "text", "video", "text")
    >>> near = local.Local(window=2)
    >>> attend_by_modality(q, k, v, kinds=kinds, rules={("video", "video"): near}).shape
    (1, 6, 2, 8)
    """
    if not len(kinds) == q.shape[1] == k.shape[1]:
        raise ValueError(
            f"kinds of {len(kinds)} tokens must be as long as q, {q.shape[1]}, and k, {k.shape[1]}"
        )
    names = list(dict.fromkeys(kinds))
    for (a, b), rule in rules.items():
        if not {a, b} <= set(names):
            raise ValueError(f"rules[{a!r}, {b!r}] must be a pair of {sorted(names)}")
        if isinstance(rule, base.Selector) and a != b:
            raise ValueError(
                f"rules[{a!r}, {b!r}] must be a pattern: {rule.expression()} takes one modality"
            )
    at = {x: np.flatnonzero([kind == x for kind in kinds]).astype(np.int32) for x in names}
    options = {"return_lse": True, "impl": impl}
    outs = []
    for a in names:
        pieces = []
        for b in names:
            rule = rules.get((a, b), base.CAUSAL)
            tokens = q[:, at[a]], k[:, at[b]], v[:, at[b]]
            if isinstance(rule, base.Selector):
                pieces.append(rule.attend(*tokens, **options))
            else:
                places = jnp.asarray(at[a]), jnp.asarray(at[b])
                pieces.append(attend_lib.attend(*tokens, mask=rule, positions=places, **options))
        outs.append(attend_lib.merge_lse(pieces))
    back = np.argsort(np.concatenate([at[x] for x in names]))
    out, lse = (jnp.concatenate(x, 1)[:, back] for x in zip(*outs, strict=True))
    return (out, lse) if return_lse else out


EXAMPLES = (MmInference(strides=(4, 6), probe=8, always=local.Local(window=8)),)
