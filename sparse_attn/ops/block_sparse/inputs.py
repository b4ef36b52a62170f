"""What every backend of the op receives, and what it must provide."""

from typing import NamedTuple, Protocol

import jax
from jaxtyping import Array, Float, Int

from sparse_attn.masks import block_mask


class Inputs(NamedTuple):
    """Validated arguments of one call. A backend reads all of them, or refuses in `check`.

    Logits are `soft_cap(q @ k * scale) + key_bias` where the mask, the segments and the lengths
    allow it, else minus infinity; `soft_cap(x) = cap * tanh(x / cap)`.

    Attributes:
      q, k, v: `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, Hv]`; query heads `gG .. gG+G-1` share
        KV head g. `q_len`, `kv_len` of the mask are T and S; nothing is padded yet.
      mask: already restricted to the segments, so that FULL blocks need no element rule at all.
      q_segment_ids, kv_segment_ids: int32 `[B, T]`, `[B, S]` or None; in PARTIAL blocks a pair is
        visible only if its ids are equal and not 0.
      q_positions, kv_positions: int32 `[M, T]`, `[M, S]` with M in (1, B), or None; what
        `mask_fn` receives in place of the token index.
      key_bias: float32 `[B, 1 or N, S]`, added to the logits of a key, or None.
      sink_logits: float32 `[N]`, one more logit in each softmax denominator, or None.
      scale: factor of the raw logits.
      logits_soft_cap: cap > 0, or None.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K Hv"]
    mask: block_mask.BlockMask
    q_segment_ids: Int[Array, "B T"] | None
    kv_segment_ids: Int[Array, "B S"] | None
    q_positions: Int[Array, "M T"] | None
    kv_positions: Int[Array, "M S"] | None
    key_bias: Float[Array, "B Nb S"] | None
    sink_logits: Float[Array, "N"] | None
    scale: float
    logits_soft_cap: float | None


class Grads(NamedTuple):
    """Gradients of a backend's `backward`, shaped like their inputs; dkey_bias None if absent."""

    dq: Float[Array, "B T N H"]
    dk: Float[Array, "B S K H"]
    dv: Float[Array, "B S K Hv"]
    dkey_bias: Float[Array, "B Nb S"] | None


class Backend(Protocol):
    """The functions of a backend module. `vjp.py` adds sinks' gradient, delta and the VJP."""

    def check(self, inputs: Inputs) -> None:
        """Raises NotImplementedError(reason) for what this backend cannot do."""

    def forward(self, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        """`out [B, T, N, Hv]` in q's dtype and `lse [B, T, N]` float32, sink included in lse.

        A row that sees nothing has out 0 and lse -inf (its sink logit if there are sinks).
        """

    def backward(self, inputs: Inputs, lse: jax.Array, dout: jax.Array, delta: jax.Array) -> Grads:
        """Gradients from `p = exp(logits - lse)` and `ds = p * (dout @ v.T - delta)`.

        `delta [B, T, N]` float32 is `sum(dout * out) - dlse`. Rows with lse = -inf give nothing.
        """


def group_size(inputs: Inputs) -> int:
    """G, the number of query heads that share one KV head."""
    return inputs.q.shape[2] // inputs.k.shape[2]
