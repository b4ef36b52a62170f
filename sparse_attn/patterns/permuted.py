"""A pattern whose tokens stand in another order: tiles, an axis order, a Hilbert curve."""

import dataclasses

from sparse_attn.masks import curves, grids, reorder
from sparse_attn.patterns import base, joint, per_head


@dataclasses.dataclass(frozen=True)
class Permuted(base.Pattern):
    """Place p of the sequence holds the token that `order` puts there; `pattern` judges tokens.

    For q, k and v that are in the new order already; `ops.reordered.attend_reordered` also
    permutes them and the output. Positions stay arithmetic: the coordinates of a place have a
    closed form. Build it with `permute`, which also enters `& | ~` and `joint`.

    Attributes:
      pattern: a pattern, on a grid of the order's shape or on positions in row-major order.
      order: a `reorder.Tiles` or `curves.Hilbert`, or its `spec` (stored as that).

    Raises:
      ValueError: there is no such order, it has no closed form, or the shapes differ.

    >>> import numpy as np
    >>> from sparse_attn.patterns import swin
    >>> windows = swin.Swin(shape=(4, 4), window_size=2)
    >>> tiled = Permuted(windows, reorder.Tiles((4, 4), (2, 2)))  # windows become runs of 4
    >>> bool((tiled.mask_fn(np.arange(4)[:, None], np.arange(4))).all())
    True
    """

    pattern: base.Pattern
    order: tuple | reorder.Reordering

    def __post_init__(self):
        if not isinstance(self.pattern, base.Pattern):
            raise ValueError(f"pattern={self.pattern!r} must be a pattern")
        order = self.order if isinstance(self.order, reorder.Reordering) else None
        order = reorder.make(tuple(self.order)) if order is None else order
        object.__setattr__(self, "order", order.spec)
        if isinstance(order, curves.Gilbert):
            raise ValueError(
                f"order={order.spec} has no closed form: lower it with masks.tables.lower"
            )
        if isinstance(self.pattern, grids.GridPattern):
            shapes = {self.pattern.shape, self.pattern.kv_shape}
            if shapes != {order.shape}:
                raise ValueError(f"order={order.spec} must have the shape of {self.pattern!r}")

    @property
    def reordering(self) -> reorder.Reordering:
        """The order as an object."""
        return reorder.make(self.order)

    @property
    def block_state_exact(self) -> bool:
        on_grid = isinstance(self.pattern, grids.GridPattern)
        return on_grid and self.pattern.exact_in(self.reordering)

    def mask_fn(self, q_pos, kv_pos):
        order = self.reordering
        if isinstance(self.pattern, grids.GridPattern):
            return grids.mask_at(self.pattern, (order, order), q_pos, kv_pos)
        return self.pattern.mask_fn(order.index(q_pos), order.index(kv_pos))

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        order = self.reordering
        if isinstance(self.pattern, grids.GridPattern):
            return grids.state_of_places(self.pattern, (order, order), q_lo, q_hi, kv_lo, kv_hi)
        q, kv = (
            grids.positions_around(order, q_lo, q_hi),
            grids.positions_around(order, kv_lo, kv_hi),
        )
        return self.pattern.block_state(*q, *kv)

    @property
    def may_be_empty(self) -> bool:
        # Where a query sees itself it does so in any order; else the key may come too late.
        return not isinstance(self.pattern, grids.GridPattern) or self.pattern.may_be_empty


def permute(pattern, order: reorder.Reordering):
    """`pattern` for tokens in `order`: `Permuted` leaves inside the same `& | ~`, heads and prefix.

    >>> from sparse_attn.patterns import causal, swin
    >>> both = swin.Swin(shape=(4, 4), window_size=2) & causal.Causal()
    >>> permute(both, reorder.Tiles((4, 4), (2, 2))).b.pattern
    Causal()
    """
    match pattern:
        case per_head.PerHead(patterns=patterns):
            return per_head.PerHead(tuple(permute(p, order) for p in patterns))
        case base.And(a=a, b=b):
            return permute(a, order) & permute(b, order)
        case base.Or(a=a, b=b):
            return permute(a, order) | permute(b, order)
        case base.Not(a=a):
            return ~permute(a, order)
        case joint.Joint(pattern=inner):
            return dataclasses.replace(pattern, pattern=permute(inner, order))
    return Permuted(pattern, order)


def _examples():
    from sparse_attn.patterns import causal, neighborhood, swin

    near = neighborhood.Neighborhood(shape=(8, 8), kernel_size=3)
    return (
        Permuted(near, reorder.Tiles((8, 8), (4, 4))),
        Permuted(near, curves.Hilbert((8, 8))),
        Permuted(swin.Swin((5, 7), 3, 1), reorder.Tiles((5, 7), (2, 3), (1, 0))),
        Permuted(
            neighborhood.Neighborhood((7, 9), 3, dilation=2),
            reorder.Tiles((7, 9), (2, 2), dilation=(2, 2)),
        ),
        Permuted(causal.Causal(), reorder.Tiles((6, 6), (2, 3))),
    )


EXAMPLES = _examples()
