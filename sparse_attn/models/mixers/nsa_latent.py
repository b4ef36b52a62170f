"""Native sparse attention on latents, its window and its global branches in different layers."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_attn.models.mixers import nsa
from sparse_attn.patterns import base as patterns_base

LOCAL, GLOBAL = ("window",), ("compressed", "selected")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NsaLatent(nsa.Nsa):
    """Local or global layers of native sparse attention on latent keys and values; they alternate.

    [arXiv:2511.00819] A global layer has the compressed and the selected branch of `nsa`, behind
    its gates, as group-head latent attention [arXiv:2505.21487]: each group of heads has a latent
    of its own. A local layer has the window alone, ungated, as multi-head latent attention
    [arXiv:2405.04434, sec. 2.1]: all heads read all latents. A local layer needs no parameters but
    those of a global one, so `per_layer((nsa_latent(branches=('window',)), nsa_latent()))`
    alternates them.

    Only the abstract of the paper was at hand. Where it leaves a choice, that of `nsa` stands (its
    gates, its two compressions, here of latents) or the simplest one: no low-rank queries, and no
    norm of the latents. There is no decoding from a cache of latents yet; `cache_per_token` counts
    what it would hold.

    Attributes:
      branches: `("window",)` is a local layer; one or both of "compressed" and "selected" a global
        one.
      latent_dim: c, width of the latent of a group, of which there are as many as KV heads; None =
        the head dimension. Kernels see heads of c + R numbers in global layers.
      rope_dim: R, how many of a query's H numbers are rotated; the key to them is one for all heads
        and stands beside the latents, as a rotation would keep an up-projection from being
        absorbed. The other H - R have no position. None = half of the head dimension.
      keys: "shared", as the branches of a layer read one set of latents.

    Raises:
      ValueError: a field is out of its range.

    >>> NsaLatent(latent_dim=32, rope_dim=16).expression()
    'nsa_latent(latent_dim=32, rope_dim=16)'
    """

    branches: tuple[str, ...] = GLOBAL
    keys: str = "shared"
    latent_dim: int | None = None
    rope_dim: int | None = None

    def _check_blocks(self):
        super()._check_blocks()
        self._check_fixed(keys="shared")
        for name in ("latent_dim", "rope_dim"):
            if getattr(self, name) is not None:
                patterns_base.check_int(name, getattr(self, name))
        if not self.is_local and "window" in self.branches:
            raise ValueError(
                f"branches={self.branches} must be {LOCAL} for a local layer, or of {GLOBAL} for a "
                "global one"
            )

    @property
    def is_local(self) -> bool:
        """True for a layer with the window alone."""
        return self.branches == LOCAL

    def sizes(self, head_dim: int) -> tuple[int, int]:
        """The width of a group's latent, and of the part of a query that is rotated.

        Raises:
          ValueError: the rotated part is odd or the whole head.

        >>> NsaLatent().sizes(64)
        (64, 32)
        """
        rope_dim = self.rope_dim or max(2, head_dim // 4 * 2)
        if rope_dim % 2 or rope_dim >= head_dim:
            raise ValueError(f"rope_dim={rope_dim} must be even and < head_dim={head_dim}")
        return self.latent_dim or head_dim, rope_dim

    def includes(self, other: patterns_base.Expression) -> bool:
        """True if this layer has the parameters of a layer with `other`, so that they alternate.

        >>> NsaLatent().includes(NsaLatent(branches=LOCAL, window=64))
        True
        """
        if type(other) is not type(self):
            return False  # Nothing else has latents for keys.
        same = (other.latent_dim, other.rope_dim) == (self.latent_dim, self.rope_dim)
        return same and (other.is_local or other._shapes == self._shapes)

    def _numbers(self, num_kv_heads, head_dim):
        width, rope_dim = self.sizes(head_dim)
        token = num_kv_heads * width + rope_dim
        # Keys and values are compressed apart, and the shared part of keys with each group's.
        return {
            "compressed": num_kv_heads * (2 * width + rope_dim),
            "selected": token,
            "window": token,
        }

    def layer(self, **fields: Any) -> nn.Module:
        self.sizes(fields["head_dim"])
        if fields.pop("short_conv", None) is not None:
            raise ValueError(f"short_conv must be None for {self.expression()}")
        return super().layer(**fields)

    @property
    def _module(self):
        return NativeSparseLatentAttention


def up_project(
    latents: Float[Array, "B S U C"], up: Float[Array, "U C G H"]
) -> Float[Array, "B S N H"]:
    """Keys or values of the N = U * G heads, G of which read each latent.

    [arXiv:2405.04434, eq. 10 and 11]

    >>> up_project(jnp.ones((1, 5, 2, 3)), jnp.ones((2, 3, 4, 8))).shape
    (1, 5, 8, 8)
    """
    return _joined(jnp.einsum("BSUC,UCGH->BSUGH", latents, up))


def absorb(q: Float[Array, "B T N H"], up: Float[Array, "U C G H"]) -> Float[Array, "B T N C"]:
    """Queries of latents, with the products that `q` has with `up_project(latents, up)`.

    The keys of a group are then its latent, as those of grouped query heads.  [sec. 2.1.2]

    >>> absorb(jnp.ones((1, 5, 8, 6)), jnp.ones((2, 3, 4, 6))).shape
    (1, 5, 8, 3)
    """
    return _joined(jnp.einsum("BTUGH,UCGH->BTUGC", _grouped(q, up), up))


def read_out(out: Float[Array, "B T N C"], up: Float[Array, "U C G H"]) -> Float[Array, "B T N H"]:
    """Attention to `up_project(latents, up)` as values, of attention to the latents themselves.

    >>> read_out(jnp.ones((1, 5, 8, 3)), jnp.ones((2, 3, 4, 6))).shape
    (1, 5, 8, 6)
    """
    return _joined(jnp.einsum("BTUGC,UCGH->BTUGH", _grouped(out, up), up))


def _grouped(x, up):
    return x.reshape(*x.shape[:2], len(up), up.shape[2], x.shape[3])


def _joined(x):
    return x.reshape(*x.shape[:2], -1, x.shape[4])


class NativeSparseLatentAttention(nsa.NativeSparseAttention):
    """Self-attention by an `NsaLatent`.

    Parameters (float32), with c and R of `NsaLatent.sizes` and K latents: `query/kernel [D, N, H]`,
    `out/kernel [N, H, D]`, `latent/kernel [D, K, c]`, `key_rope/kernel [D, 1, R]`,
    `key_up [K, c, N, H - R]` and `value_up [K, c, N, H]`; in global layers those of the compression
    and of the gates too, as of `NativeSparseAttention`, where keys have c + R numbers and values c.

    A local layer reads its latents as one of K * c numbers. In a global one a head reads that of
    its group: of the up-projections it uses the blocks `[k, :, heads of k]`, no gradient reaches
    the others. It runs on absorbed queries, so that keys are those of K heads and a group shares
    its choice of blocks; a local layer makes keys and values of all heads, which is less work where
    many tokens are read at once: heads are shorter than K * c.

    Attributes:
      rule: the `NsaLatent`.
      num_heads, num_kv_heads, head_dim, ..: as of `NativeSparseAttention`; there is a latent for
        each KV head.

    >>> import jax
    >>> layer = NsaLatent(branches=LOCAL, window=8).layer(num_heads=4, num_kv_heads=2, head_dim=8)
    >>> variables = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 20, 32)))
    >>> variables["params"]["value_up"].shape
    (2, 8, 4, 8)
    """

    def _projected(self, x_BTD, positions, segment_ids):
        del segment_ids
        width, rope_dim = self.rule.sizes(self.head_dim)
        q_BTNH = self._project(x_BTD, self.num_heads, self.head_dim, "query")
        q_BTNH, q_rope = jnp.split(q_BTNH, [self.head_dim - rope_dim], -1)
        latents = self._project(x_BTD, self.num_kv_heads, width, "latent")
        k_rope = self._rotate(self._project(x_BTD, 1, rope_dim, "key_rope"), positions)
        key_up = self._up("key", width, self.head_dim - rope_dim)
        if self.rule.is_local:
            latents = latents.reshape(*latents.shape[:2], 1, -1)
            q, k = q_BTNH, up_project(latents, key_up)
            v = up_project(latents, self._up("value", width, self.head_dim))
        else:
            q, k, v = absorb(q_BTNH, key_up), latents, latents
        k_rope = jnp.broadcast_to(k_rope, (*k.shape[:3], rope_dim))
        q = jnp.concatenate([q, self._rotate(q_rope, positions)], -1)
        return q, dict.fromkeys(nsa.BRANCHES, (jnp.concatenate([k, k_rope], -1), v))

    def _up(self, name, width, size):
        """An up-projection for `up_project`, `[1, K * c, N, size]` or `[K, c, G, size]`."""
        count, heads = self.num_kv_heads, self.num_heads
        init = nn.initializers.variance_scaling(
            1.0, "fan_in", "normal", in_axis=1, out_axis=3, batch_axis=(0, 2)
        )
        up = self.param(f"{name}_up", init, (count, width, heads, size)).astype(self.dtype)
        if self.rule.is_local:
            # Sums of K latents instead of one: with this factor they start at the same size.
            return up.reshape(1, -1, heads, size) * count**-0.5
        up = up.reshape(count, width, count, heads // count, size)
        return jnp.einsum("UCUGH->UCGH", up)

    def _gated(self, x_BTD, outs):
        if self.rule.is_local:
            return outs["window"]
        width, _ = self.rule.sizes(self.head_dim)
        return read_out(super()._gated(x_BTD, outs), self._up("value", width, self.head_dim))


EXAMPLES = (
    NsaLatent(block_kv=8, top_k=3, compress_block=4, stride=2, latent_dim=6, rope_dim=4),
    NsaLatent(branches=LOCAL, window=8),
)
