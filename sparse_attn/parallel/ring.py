"""Ring attention: keys and values travel between the ranks, queries stay.

Each rank holds a part of the row and adds up, by their lse, the pieces of attention to the parts
that reach it [arXiv:2310.01889, sec. 3]. The mask decides what travels: a pair of ranks between
which nothing is visible is neither sent nor computed. A part moves on from the neighbour that has
just used it; where the mask skips a rank, it comes straight from its owner. In the backward pass
the gradients of a part travel with it, and go home from the last rank that used it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from sparse_attn.masks import block_mask
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import softmax
from sparse_attn.parallel import local, split

Pairs = tuple[tuple[int, int], ...]


class Route:
    """Who sends what to whom; (source, destination) pairs by step, step 0 being a rank's own part.

    At step s rank r uses the part of rank (r - s) modulo the number of ranks.

    Attributes:
      steps: those in which any rank has something to compute; step 0 where nothing is visible.
      relayed: by step, what comes from the left neighbour, which used it one step before.
      direct: by step, what comes from its owner.
      home: by step, where gradients go from the last rank of a chain back to the owner.

    >>> route = Route(np.tri(4, k=0, dtype=bool) & ~np.tri(4, k=-2, dtype=bool))  # a window
    >>> route.steps, route.relayed[1], route.home[1]
    ([0, 1], ((0, 1), (1, 2), (2, 3)), ((1, 0), (2, 1), (3, 2)))
    """

    def __init__(self, pairs: Bool[np.ndarray, "R R"]):
        ranks = len(pairs)
        users = [{r for r in range(ranks) if pairs[r, (r - step) % ranks]} for step in range(ranks)]
        self.steps = [step for step, at in enumerate(users) if at] or [0]
        # Every rank has its own part before step 1, whether it uses it or not.
        before = [set(), set(range(ranks)), *users[1:]]
        relayed = [{r for r in at if (r - 1) % ranks in before[s]} for s, at in enumerate(users)]
        self.relayed: list[Pairs] = [
            tuple(((r - 1) % ranks, r) for r in sorted(at)) for at in relayed
        ]
        self.direct: list[Pairs] = [
            tuple(((r - step) % ranks, r) for r in sorted(at - relayed[step])) if step else ()
            for step, at in enumerate(users)
        ]
        ends = [at - {(r - 1) % ranks for r in on} for at, on in zip(users, [*relayed[1:], set()])]
        self.home: list[Pairs] = [
            tuple((r, (r - step) % ranks) for r in sorted(at)) if step else ()
            for step, at in enumerate(ends)
        ]


def _sent(x: Any, pairs: Pairs) -> Any:
    """What a rank is sent; zeros where it is not among the destinations."""
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, "seq", pairs), x)


class Plan:
    """Ring attention under static masks; see `attention.attend`."""

    def __init__(self, masks: Sequence[block_mask.BlockMask], *, order: Sequence[int], ranks: int):
        splits = [split.Split(mask, order=order, ranks=ranks) for mask in masks]
        self.route = Route(np.any([s.pairs for s in splits], 0))
        self._stacked = {
            step: [s.of_pairs([(r - step) % ranks for r in range(ranks)]) for s in splits]
            for step in self.route.steps
        }
        positions = split.places(order, masks[0].q_len).reshape(ranks, 1, -1)
        self.arrays = {
            "positions": {s: np.roll(positions, s, 0) for s in {0, *self.route.steps}},
            "lists": {step: [x.lists for x in of] for step, of in self._stacked.items()},
        }

    def run(
        self, options: local.Options, queries: local.Queries, keys: local.Keys, arrays: Any
    ) -> tuple[Array, Array]:
        """`out` and `lse` of this rank's queries over the keys of all ranks."""
        others = (queries.ids, keys.ids, jax.tree.map(lambda x: x[0], arrays))

        def forward(floats, others):
            queries, keys, at = self._unpack(floats, others)
            whole = None
            for step, part, _ in self._parts(keys):
                out, lse = local.forward(*at(step, options, queries), part)
                out = out.astype(jnp.float32)
                whole = (out, lse) if whole is None else attend_lib.merge_lse([whole, (out, lse)])
            return whole[0].astype(queries.q.dtype), whole[1]

        def backward(floats, others, lse, dout, delta):
            queries, keys, at = self._unpack(floats, others)
            dq = jnp.zeros(queries.q.shape, jnp.float32)
            carried = mine = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), floats[1:])
            for step, part, relay in self._parts(keys):
                grads = local.backward(*at(step, options, queries), part, lse, dout, delta)
                dq = dq + grads.dq.astype(jnp.float32)
                found = (grads.dk, grads.dv, grads.dkey_bias)
                if not step:
                    mine = jax.tree.map(jnp.add, mine, found)
                    continue
                # Zeros on ranks that a part reached straight from its owner: a new chain begins.
                if relay and step > 1:
                    carried = jax.tree.map(jnp.add, _sent(carried, relay), found)
                else:
                    carried = jax.tree.map(lambda x: x.astype(jnp.float32), found)
                if self.route.home[step]:
                    mine = jax.tree.map(jnp.add, mine, _sent(carried, self.route.home[step]))
            return jax.tree.map(lambda g, x: g.astype(x.dtype), (dq, *mine), floats)

        floats = (queries.q, keys.k, keys.v, keys.bias)
        # Only arguments, out and lse are kept: what was received is received again.
        return softmax.with_backward(forward, backward, floats, others, may_be_empty=True)

    def _parts(self, own: local.Keys):
        """(step, keys of that step, what was relayed), sent as they are asked for."""
        before = own
        for step in self.route.steps:
            relay, direct = self.route.relayed[step], self.route.direct[step]
            if not step:
                yield step, own, ()
                continue
            got = [_sent(x, pairs) for x, pairs in ((before, relay), (own, direct)) if pairs]
            # A rank is among the destinations of one of them only, and gets zeros from the other.
            before = got[0] if len(got) == 1 else jax.tree.map(jnp.add, *got)
            yield step, before, relay

    def _unpack(self, floats, others):
        q, k, v, bias = floats
        q_ids, kv_ids, arrays = others

        def at(step, options, queries):
            lists, positions = arrays["lists"][step], arrays["positions"]
            masks = [s.mask(x) for s, x in zip(self._stacked[step], lists)]
            return masks, options, queries._replace(kv_positions=positions[step])

        queries = local.Queries(q, q_ids, arrays["positions"][0])
        return queries, local.Keys(k, v, bias, kv_ids), at
