"""MoBA on small blocks, with keys that a short convolution clusters first."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparse_attn.ops import tiles
from sparse_attn.patterns import base as patterns_base
from sparse_attn.selection import moba


@dataclasses.dataclass(frozen=True, kw_only=True)
class MobaConv(moba.Moba):
    """Routing of `moba` by keys that a causal depth-wise convolution has mixed; for training.

    [arXiv:2511.11571] Keys are `k[t] + silu(sum_i w[i] * k[t - i])`, for each KV head and
    dimension; the weights start as an average. (That the sum is added to the key, and goes through
    a silu, is this file's choice.) The mixed keys are those of attention too: `attend` mixes them
    for both and trains the weights. `select`, and so a layer that names this rule as its pattern,
    mixes for the choice alone, and no gradient reaches the weights there.

    The routing signal of one key among B others is `snr` deviations above the rest, so smaller
    blocks choose better at the same number of keys seen.

    Attributes:
      width: taps of the convolution.

    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
    >>> rule = MobaConv(block_kv=8, top_k=2)
    >>> rule.select(q, k, params=rule.params_like(2, 2, 8)).kv_counts[0, 0, ::8].tolist()
    [1, 2, 3, 3, 3, 3, 3, 3]
    """

    width: int = 3

    def __post_init__(self):
        super().__post_init__()
        patterns_base.check_int("width", self.width)

    def params_like(
        self, num_heads: int, num_kv_heads: int, head_dim: int
    ) -> dict[str, np.ndarray]:
        taps = np.full((num_kv_heads, self.width, head_dim), 1 / self.width, np.float32)
        return {"key_conv": taps}

    def scores(self, q, k, blocks):
        ids = None if blocks.segment_ids is None else blocks.segment_ids[1]
        return super().scores(q, mix(k, blocks.params["key_conv"], ids), blocks)

    @tiles.one_program
    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K Hv"],
        *,
        segment_ids: Any = None,
        params: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Mixes the keys, selects, then attends to the mixed keys; `options` as in `moba`."""
        ids = segment_ids[1] if isinstance(segment_ids, tuple) else segment_ids
        names = {f.name: getattr(self, f.name) for f in dataclasses.fields(moba.Moba)}
        return moba.Moba(**names).attend(
            q, mix(k, params["key_conv"], ids), v, segment_ids=segment_ids, **options
        )


@tiles.one_program
def mix(
    k: Float[Array, "B S K H"],
    taps: Float[Any, "K W H"],
    segment_ids: Int[Array, "B S"] | None = None,
) -> Float[Array, "B S K H"]:
    """`k + silu(causal depth-wise convolution of k)`; taps do not reach other documents.

    >>> k = jnp.array([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
    >>> mix(k, jnp.array([0.0, 2.0]).reshape(1, 2, 1)).ravel().round(3).tolist()  # 2 * sigmoid(2)
    [1.0, 1.76..., 0.0]
    """
    x = k.astype(jnp.float32)
    total = 0
    for back in range(taps.shape[1]):
        moved = jnp.pad(x, ((0, 0), (back, 0), (0, 0), (0, 0)))[:, : x.shape[1]]
        if segment_ids is not None:
            before = jnp.pad(segment_ids, ((0, 0), (back, 0)))[:, : x.shape[1]]
            moved = jnp.where((before == segment_ids)[:, :, None, None], moved, 0)
        total = total + moved * taps[:, back]
    return (x + jax.nn.silu(total)).astype(k.dtype)


def snr(gap: float, head_dim: int, block: int) -> float:
    """Deviations between the score of the block with the wanted key and of another.

    `gap * sqrt(head_dim / (2 * block))`, for unit keys in random directions and a difference
    `gap` between the wanted key's product with the query and that of the others.

    >>> snr(1.0, head_dim=128, block=64)
    1.0
    """
    return gap * (head_dim / (2 * block)) ** 0.5


EXAMPLES = (MobaConv(block_kv=8, top_k=2),)
