"""Ulysses attention: tokens split between ranks become heads split between ranks, and back.

Two all-to-alls around attention [arXiv:2309.14509, sec. 3]: in between, each rank has all tokens of
its share of the heads, so any mask runs as on one device. The ranks must divide the heads.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sparse_attn.masks import block_mask
from sparse_attn.parallel import local, split


class Plan:
    """Ulysses attention under static masks, of `ranks` groups of heads each."""

    def __init__(self, masks: Sequence[block_mask.BlockMask], *, order: Sequence[int], ranks: int):
        self._masks, self._ranks = masks, ranks
        places = split.places(order, masks[0].q_len)
        # Where tokens do not stand in the order of the text, they are put into it in between.
        self._moved = None if (np.diff(places) == 1).all() else places
        self.arrays = ()

    def run(
        self, options: local.Options, queries: local.Queries, keys: local.Keys, arrays: Any
    ) -> tuple[Array, Array]:
        """`out` and `lse` of this rank's queries over the keys of all ranks."""
        whole_queries = local.Queries(self._to_heads(queries.q), self._all(queries.ids))
        bias = keys.bias
        if bias is not None:
            bias = jnp.moveaxis(bias, 1, 2)
            bias = self._all(bias) if bias.shape[2] == 1 else self._to_heads(bias)
            bias = jnp.moveaxis(bias, 2, 1)
        whole_keys = local.Keys(
            self._to_heads(keys.k), self._to_heads(keys.v), bias, self._all(keys.ids)
        )
        out, lse = local.attend(self._masks, options, whole_queries, whole_keys)
        return self._to_tokens(out), self._to_tokens(lse)

    def _to_heads(self, x):
        """`[B, T / R, N, ...]` to `[B, T, N / R, ...]`."""
        x = jax.lax.all_to_all(x, "seq", split_axis=2, concat_axis=1, tiled=True)
        return x if self._moved is None else x[:, np.argsort(self._moved)]

    def _to_tokens(self, x):
        x = x if self._moved is None else x[:, self._moved]
        return jax.lax.all_to_all(x, "seq", split_axis=1, concat_axis=2, tiled=True)

    def _all(self, x):
        if x is None:
            return None
        x = jax.lax.all_gather(x, "seq", axis=1, tiled=True)
        return x if self._moved is None else x[:, np.argsort(self._moved)]
