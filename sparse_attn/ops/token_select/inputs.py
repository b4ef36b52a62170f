"""What every backend of the op receives, and what it must provide."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from sparse_attn.patterns import base


class Inputs(NamedTuple):
    """Validated arguments of one call.

    Query t of table u sees key s when `s // block` is in `selected[b, t, u]`, the pattern allows
    the pair, and the documents agree.

    Attributes:
      q, k, v: `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, Hv]`; padding tokens are zero.
      selected: int32 `[B, T, U, n]`, each block at most once and -1 elsewhere; N / U consecutive
        query heads share a table, U / K consecutive tables a KV head.
      q_segment_ids, kv_segment_ids: int32 `[B, T]`, `[B, S]`, 0 = padding; or None.
      pattern: its `mask_fn` hides keys inside the selected blocks.
      block: tokens per block of keys.
      scale: factor of the logits.
      plan: what the backend's `plan` gave, arrays of integers; None if it has none.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K Hv"]
    selected: Int[Array, "B T U n"]
    q_segment_ids: Int[Array, "B T"] | None
    kv_segment_ids: Int[Array, "B S"] | None
    pattern: base.Pattern
    block: int
    scale: float
    plan: PyTree = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """U tables, G query heads of each, and U / K tables of a KV head."""
        tables = self.selected.shape[2]
        return tables, self.q.shape[2] // tables, tables // self.k.shape[2]


class Grads(NamedTuple):
    """Gradients of a backend's `backward`, shaped like their inputs."""

    dq: Float[Array, "B T N H"]
    dk: Float[Array, "B S K H"]
    dv: Float[Array, "B S K Hv"]


class Backend(Protocol):
    """The functions of a backend module; one without `backward` is differentiated by JAX.

    One with `backward` may have `plan(inputs, kernel)`: what depends on integers alone, computed
    once for both passes, which find it in their inputs. One may have `once(selected, blocks)`: a
    kernel that takes blocks listed again, or missing, out of short lists.
    """

    def check(self, inputs: Inputs, kernel: str | None) -> None:
        """Raises NotImplementedError(reason) for what this backend cannot do."""

    def forward(self, inputs: Inputs, kernel: str | None) -> tuple[jax.Array, jax.Array]:
        """`out [B, T, N, Hv]` in q's dtype and `lse [B, T, N]` float32; 0 and -inf if empty."""

    def backward(
        self, inputs: Inputs, kernel: str | None, lse: jax.Array, dout: jax.Array, delta: jax.Array
    ) -> Grads:
        """Gradients from `p = exp(logits - lse)` and `ds = p * (dout @ v.T - delta)`.

        `delta [B, T, N]` is `sum(dout * out) - dlse`; both are 0 where lse is -inf.
        """


def finite(inputs: Inputs):
    """k and v with the tokens zeroed that hold a non-finite number, and which those are."""
    bad = ~(jnp.isfinite(inputs.k).all(-1) & jnp.isfinite(inputs.v).all(-1))
    return *(jnp.where(bad[..., None], 0, x) for x in (inputs.k, inputs.v)), bad
