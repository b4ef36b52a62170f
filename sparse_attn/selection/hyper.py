"""Blocks on the diagonal of hash-sorted tokens, and an estimate of the rest from samples."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import tiles
from sparse_attn.patterns import base as patterns_base
from sparse_attn.patterns import chunked, full
from sparse_attn.selection import base, pbs, svg2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hyper(pbs.Reordered):
    """HyperAttention: sorted locality-sensitive hashes, uniform samples, recursion if causal.

    [arXiv:2310.05869] Queries and keys are sorted by their side of `planes` random
    hyperplanes, in the order of a Gray code, so that neighbouring buckets differ in one plane;
    blocks on the diagonal of that order are exact. The rest of the mass is estimated from
    `samples` keys, drawn with replacement and weighted by `S / samples`, those in the query's
    own block left out. A causal pattern is halved down to `least` tokens: two causal halves, and a
    rectangle that this algorithm estimates. Near-linear, training-free; the estimate changes with
    `seed`. Sampling is uniform, as the paper's experiments do it.

    Attributes:
      block_q, block_kv: tokens of a block of the sorted order; equal.
      samples: sampled keys; None = no estimate, the blocks alone.
      planes: random hyperplanes.
      least: longest causal part that is computed exactly.

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 8))
    >>> jax.eval_shape(Hyper(block_q=16, block_kv=16, samples=8, least=16).attend, q, k, v).shape
    (1, 64, 2, 8)
    """

    block_q: int = 256
    block_kv: int = 256
    always: patterns_base.Pattern | None = None
    samples: int | None = 256
    planes: int = 7
    least: int = 4096
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        for name in ("planes", "least"):
            patterns_base.check_int(name, getattr(self, name))
        if self.samples is not None:
            patterns_base.check_int("samples", self.samples)
        if self.block_q != self.block_kv:
            raise ValueError(f"block_q={self.block_q} must be block_kv={self.block_kv}")
        if self.pattern not in (base.CAUSAL, full.Full()) or self.always is not None:
            raise ValueError(
                f"pattern={self.pattern.expression()} must be causal() or full(), and always None"
            )

    @tiles.one_program
    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        *,
        key: Array | None = None,
        return_lse: bool = False,
        impl: str | None = None,
    ) -> Any:
        """Sorts, attends and estimates; `key` is a PRNG key, None = that of `seed`.

        Raises:
          ValueError: causal, and q and k differ in length.
        """
        key = jax.random.key(self.seed) if key is None else key
        if not self.pattern.causal:
            out, lse = self._rectangle(q, k, v, key, impl)
        elif q.shape[1] != k.shape[1]:
            raise ValueError(f"k.shape={k.shape} must have the length of q.shape={q.shape}")
        else:
            out, lse = self._triangle(q, k, v, key, impl)
        return (out, lse) if return_lse else out

    def _triangle(self, q, k, v, key, impl):
        length = q.shape[1]
        if length <= self.least:
            return attend_lib.attend(q, k, v, mask=self.pattern, return_lse=True, impl=impl)
        middle = length // 2
        keys = jax.random.split(key, 3)
        first = self._triangle(*(x[:, :middle] for x in (q, k, v)), keys[0], impl)
        late = [x[:, middle:] for x in (q, k, v)]
        second = attend_lib.merge_lse(
            [
                self._triangle(*late, keys[1], impl),
                self._rectangle(late[0], k[:, :middle], v[:, :middle], keys[2], impl),
            ]
        )
        return tuple(jnp.concatenate(x, 1) for x in zip(first, second, strict=True))

    def _rectangle(self, q, k, v, key, impl):
        batch, q_len, heads, dim = q.shape
        kv_len = k.shape[1]
        for_planes, for_samples = jax.random.split(key)
        planes = jax.random.normal(for_planes, (self.planes, dim))
        group = heads // k.shape[2]
        q_order = lsh_order(q, planes)
        kv_order = lsh_order(jnp.repeat(k, group, 2), planes)
        sorted_q = pbs.moved(q, q_order, heads)
        sorted_k, sorted_v = (pbs.moved(x, kv_order, heads) for x in (k, v))
        # With other lengths, a place of queries stands beside the place of keys at its part.
        q_place = np.arange(q_len) * kv_len // q_len
        kv_place = np.arange(kv_len)
        diagonal = chunked.Chunked(size=self.block_q, two_sided=True)
        pieces = [
            attend_lib.attend(
                sorted_q, sorted_k, sorted_v, mask=diagonal,
                positions=(jnp.asarray(q_place, jnp.int32), jnp.asarray(kv_place, jnp.int32)),
                return_lse=True, impl=impl,
            )
        ]  # fmt: skip
        if self.samples is not None:
            drawn = jnp.sort(jax.random.randint(for_samples, (self.samples,), 0, kv_len))
            weight = jnp.full((batch * heads, self.samples), np.log(kv_len / self.samples))
            pieces.append(
                attend_lib.attend(
                    sorted_q, sorted_k[:, drawn], sorted_v[:, drawn], mask=~diagonal,
                    positions=(jnp.asarray(q_place, jnp.int32), drawn.astype(jnp.int32)),
                    key_bias=weight.astype(jnp.float32), return_lse=True, impl=impl,
                )
            )  # fmt: skip
        return tuple(svg2.back(x, q_order) for x in attend_lib.merge_lse(pieces))


@tiles.one_program
def lsh_order(x: Float[Array, "B T N H"], planes: Float[Array, "p H"]) -> Int[Array, "B N T"]:
    """The token at each place when tokens are sorted by the Gray rank of their hash.

    >>> x = jnp.array([[1.0, 1], [-1, -1], [1, -1], [-1, 1]]).reshape(1, 4, 1, 2)
    >>> lsh_order(x, jnp.eye(2)).tolist()  # hashes 00, 01, 11, 10: neighbours differ in one bit
    [[[1, 3, 0, 2]]]
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    bits = (jnp.einsum("BTNH,pH->BNTp", x, planes) > 0).astype(jnp.int32)
    ranks = jnp.cumsum(bits, -1) % 2  # Each bit of the rank is the parity of those before it.
    weights = 2 ** np.arange(planes.shape[0])[::-1]
    return jnp.argsort((ranks * weights).sum(-1), axis=-1, stable=True)


EXAMPLES = (Hyper(block_q=8, block_kv=8, samples=4, planes=3, least=8),)
