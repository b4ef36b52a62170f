"""A decoder with a pattern per layer: RMSNorm, rotary positions, grouped KV heads, SwiGLU."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from sparse_attn.models import attention, dtypes
from sparse_attn.parallel import attention as parallel_lib
from sparse_attn.parallel import mesh
from sparse_attn.patterns import base, causal, per_head, per_layer
from sparse_attn.selection import base as selection_base

# What the backward pass finds in memory: everything, only what enters a block, or also the results
# of the block's matrix products.
REMAT = {"none": None, "block": None, "dots": jax.checkpoint_policies.dots_saveable}
LAYER_LOOPS = ("scan", "unroll")

Layer = base.Pattern | per_head.PerHead | selection_base.Selector
Schedule = Layer | per_layer.PerLayer


@dataclasses.dataclass(frozen=True)
class LayersConfig:
    """The shape of a stack of layers; hashable, so a model is static under jit.

    Attributes:
      num_layers: L.
      embed_dim: D, the width of the residual stream.
      num_heads, num_kv_heads, head_dim: N, K (None = N), H (None = D // N).
      mlp_dim: F, width of the gated MLP; None = 8/3 D, rounded up to a multiple of 32.
      pattern: one `Pattern`, `PerHead` or `Selector` for all layers, or a `PerLayer` schedule.
      block: tokens per block of the attention masks; None = `attend` chooses. Selectors have
        blocks of their own.
      impl: backend of `attend`; None = the best one on the device.
      tokens: see `parallel.attention.Tokens`; with an order, rows and positions come in it.
      dtype: of the computation, "float32", "bfloat16" or "auto" (`dtypes.of`). Parameters,
        softmax statistics, norms and logits are float32 always.
      remat: "none" keeps all activations for the backward pass; "block" recomputes each block
        from its input (least memory, about a third more compute); "dots" keeps the results of
        matrix products and recomputes the rest.
      layer_loop: "scan" compiles one copy of the repeating part of the schedule: one layer, or
        one cycle of a `PerLayer`. "unroll" compiles all layers one after another.
      rope_base: see `SelfAttention`.
      attention_soft_cap: `cap * tanh(x / cap)` on attention logits [arXiv:2408.00118, sec. 2];
        None = off.
      sink_logits: None or "learned", see `SelfAttention`.
      short_conv: tokens that a convolution mixes before attention, see `SelfAttention`; None = off.

    Raises:
      ValueError: a size is not positive, heads do not divide, or a choice is unknown.
    """

    num_layers: int = 4
    embed_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    pattern: Any = dataclasses.field(default_factory=causal.Causal)
    block: int | None = None
    impl: str | None = None
    tokens: parallel_lib.Tokens = dataclasses.field(default_factory=parallel_lib.Tokens)
    dtype: str = "float32"
    remat: str = "none"
    layer_loop: str = "scan"
    rope_base: float | None = 10_000.0
    attention_soft_cap: float | None = None
    sink_logits: str | None = None
    short_conv: int | None = None

    def __post_init__(self):
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        for name in ("num_layers", "embed_dim", "num_heads", "num_kv_heads"):
            self._check_positive(name)
        if self.head_dim is None:
            if self.embed_dim % self.num_heads:
                raise ValueError(
                    f"num_heads={self.num_heads} must divide embed_dim={self.embed_dim}, or give "
                    "head_dim"
                )
            object.__setattr__(self, "head_dim", self.embed_dim // self.num_heads)
        if self.mlp_dim is None:
            object.__setattr__(self, "mlp_dim", -(-8 * self.embed_dim // (3 * 32)) * 32)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even")
        if not isinstance(self.pattern, Schedule):
            raise ValueError(
                f"pattern={self.pattern!r} must be a Pattern, PerHead, Selector or PerLayer"
            )
        selectors = {p for p in self.layer_patterns() if isinstance(p, selection_base.Selector)}
        sizes = self.num_heads, self.num_kv_heads, self.head_dim
        trained = [x for x in selectors if x.params_like(*sizes)]
        if trained and set(self.layer_patterns()) != set(trained[:1]):
            raise ValueError(
                f"pattern: all layers must have {trained[0].expression()}, as their parameters are "
                "stacked"
            )
        self.largest_layer()
        self._check_choice("dtype", dtypes.CHOICES)
        self._check_choice("remat", REMAT)
        self._check_choice("layer_loop", LAYER_LOOPS)
        self._check_choice("sink_logits", attention.SINK_LOGITS)
        if self.short_conv is not None:
            self._check_positive("short_conv")

    def _check_positive(self, name):
        if getattr(self, name) < 1:
            raise ValueError(f"{name}={getattr(self, name)} must be >= 1")

    def _check_choice(self, name, allowed):
        if getattr(self, name) not in allowed:
            raise ValueError(f"{name}={getattr(self, name)!r} must be one of {tuple(allowed)}")

    def layer_patterns(self) -> tuple[Layer, ...]:
        """The pattern of each layer.

        >>> from sparse_attn.patterns import local
        >>> schedule = per_layer.PerLayer((local.Local(window=8), causal.Causal()))
        >>> config = TransformerConfig(vocab_size=256, num_layers=3, pattern=schedule)
        >>> config.layer_patterns()[1:]
        (Causal(), Local(window=8, reach=None))
        """
        if isinstance(self.pattern, per_layer.PerLayer):
            return tuple(self.pattern.for_layer(i) for i in range(self.num_layers))
        return (self.pattern,) * self.num_layers

    def largest_layer(self) -> Layer:
        """The layer whose parameters include those of all others: a mixer, where there is one.

        Raises:
          ValueError: no layer has the parameters of all others.
        """
        kinds = tuple(dict.fromkeys(self.layer_patterns()))
        mixers = [p for p in kinds if hasattr(p, "layer")]
        for kind in mixers or kinds:
            if not mixers or all(kind.includes(p) for p in kinds):
                return kind
        names = ", ".join(sorted(p.expression() for p in kinds))
        raise ValueError(
            f"pattern: {names}: one of them must have the parameters of all others, as those of "
            "all layers are stacked"
        )

    def cycle(self) -> tuple[Layer, ...]:
        """The shortest run of layer patterns that, repeated, is the schedule.

        >>> TransformerConfig(vocab_size=256, num_layers=3).cycle()
        (Causal(),)
        """
        layers = self.layer_patterns()
        lengths = (n for n in range(1, len(layers) + 1) if len(layers) % n == 0)
        return next(layers[:n] for n in lengths if layers[:n] * (len(layers) // n) == layers)


@dataclasses.dataclass(frozen=True)
class TransformerConfig(LayersConfig):
    """The shape of a `Transformer`: its layers, its vocabulary and its output.

    Attributes:
      vocab_size: V, tokens.
      logits_soft_cap: as `attention_soft_cap`, on output logits; None = off.
      output: "tied" uses the embedding as output matrix, "untied" has its own.

    Raises:
      ValueError: as `LayersConfig`.
    """

    vocab_size: int = dataclasses.field(kw_only=True)
    logits_soft_cap: float | None = None
    output: str = "tied"

    def __post_init__(self):
        super().__post_init__()
        self._check_positive("vocab_size")
        self._check_choice("output", ("tied", "untied"))


class RMSNorm(nn.Module):
    """Divides by the root mean square, in float32.  [arXiv:1910.07467, eq. 4]"""

    dtype: Any = jnp.float32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale_D = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.epsilon)
        return (x * scale_D).astype(self.dtype)


class GatedMLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`.  [arXiv:2002.05202, eq. 6]"""

    mlp_dim: int
    dtype: Any = jnp.float32
    out_scale: float = 1.0

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        def dense(features, name, scale=1.0):
            return nn.Dense(
                features,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=nn.initializers.variance_scaling(scale**2, "fan_in", "normal"),
                name=name,
            )

        gate_BTF = dense(self.mlp_dim, "gate")(x_BTD)
        up_BTF = dense(self.mlp_dim, "up")(x_BTD)
        return dense(x_BTD.shape[-1], "down", self.out_scale)(nn.silu(gate_BTF) * up_BTF)


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream; the body of a scan."""

    config: LayersConfig
    pattern: Any

    @nn.compact
    def __call__(self, x_BTD, positions_BT, segment_ids_BT):
        c, dtype = self.config, dtypes.of(self.config.dtype)
        # Each block adds two branches: with this factor their sum over depth keeps the size of one.
        out_scale = (2 * c.num_layers) ** -0.5
        x_BTD = mesh.shard(x_BTD, "batch", "length", None)
        # A mixer brings a module of its own.
        make = getattr(self.pattern, "layer", None)
        if make is None:
            make = functools.partial(attention.SelfAttention, pattern=self.pattern)
        x_BTD = x_BTD + make(
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            block=c.block,
            impl=c.impl,
            tokens=c.tokens,
            dtype=dtype,
            rope_base=c.rope_base,
            logits_soft_cap=c.attention_soft_cap,
            sink_logits=c.sink_logits,
            short_conv=c.short_conv,
            out_scale=out_scale,
            name="attention",
        )(
            RMSNorm(dtype, name="attention_norm")(x_BTD),
            positions=positions_BT,
            segment_ids=segment_ids_BT,
        )
        mlp = GatedMLP(c.mlp_dim, dtype, out_scale, name="mlp")
        return x_BTD + mlp(RMSNorm(dtype, name="mlp_norm")(x_BTD)), None


class Cycle(nn.Module):
    """Blocks `block_0` ... of one cycle of the schedule, one after another; the body of a scan."""

    block: Any
    config: LayersConfig
    patterns: tuple[Any, ...]

    @nn.compact
    def __call__(self, x_BTD, positions_BT, segment_ids_BT):
        for i, pattern in enumerate(self.patterns):
            block = self.block(self.config, pattern, name=f"block_{i}")
            x_BTD, _ = block(x_BTD, positions_BT, segment_ids_BT)
        return x_BTD, None


class Transformer(nn.Module):
    """Decoder-only language model [arXiv:1706.03762] in its usual form [arXiv:2302.13971, sec. 2].

    The parameters do not depend on the pattern, the layer loop or remat: those of all layers are
    stacked, so one checkpoint and one seed serve every schedule. Where a schedule has a mixer
    (`models/mixers/`), every layer holds its parameters too, or, of mixers without the keys and
    values of others, its parameters instead. Paths and shapes (float32):

        embedding                              [V, D]
        layers/attention_norm/scale            [L, D]
        layers/attention/query/kernel          [L, D, N, H]
        layers/attention/(key|value)/kernel    [L, D, K, H]
        layers/attention/out/kernel            [L, N, H, D]
        layers/attention/sink_logits           [L, N]        if learned
        layers/attention/(query|..)_taps       [L, W, .., H] with short_conv
        layers/mlp_norm/scale                  [L, D]
        layers/mlp/(gate|up)/kernel            [L, D, F]
        layers/mlp/down/kernel                 [L, F, D]
        final_norm/scale                       [D]
        output                                 [V, D]        if untied

    >>> config = TransformerConfig(vocab_size=64, num_layers=2, embed_dim=32)
    >>> model = Transformer(config)
    >>> tokens = jnp.zeros((1, 16), jnp.int32)
    >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), tokens)
    >>> logits.shape, variables["params"]["layers"]["attention"]["query"]["kernel"].shape
    ((1, 16, 64), (2, 32, 4, 8))
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits (float32) of the token after each position.

        Args:
          tokens_BT: int32 ids.
          segment_ids: packed documents, 0 = padding; None = one document per row.
          positions: for the rotation, usually restarting per document; None = 0 .. T-1. The
            patterns see the place in the row, whatever the positions.
        """
        c, dtype = self.config, dtypes.of(self.config.dtype)
        if positions is None:
            places_T = jnp.asarray(c.tokens.places(tokens_BT.shape[1]))
            positions = jnp.broadcast_to(places_T, tokens_BT.shape)
        # The logit of a token that still stands in its own residual stream starts at std * D at
        # most: 3 is small against log(V), so a tied output begins near a uniform guess.
        init = nn.initializers.normal(min(0.02, 3 / c.embed_dim))
        embedding_VD = self.param("embedding", init, (c.vocab_size, c.embed_dim))
        # Gathered from where its parts lie before it is looked into, not token by token after.
        table_VD = mesh.shard(embedding_VD.astype(dtype), None, None)
        x_BTD = table_VD[tokens_BT] * c.embed_dim**0.5
        x_BTD = apply_layers(self, x_BTD, positions, segment_ids)
        x_BTD = RMSNorm(dtype, name="final_norm")(x_BTD)
        output_VD = table_VD
        if c.output == "untied":
            output_VD = self.param("output", init, (c.vocab_size, c.embed_dim))
        logits_BTV = jnp.einsum(
            "BTD,VD->BTV", x_BTD, output_VD.astype(dtype), preferred_element_type=jnp.float32
        )
        if c.logits_soft_cap is not None:
            logits_BTV = c.logits_soft_cap * jnp.tanh(logits_BTV / c.logits_soft_cap)
        return logits_BTV


def apply_layers(
    model: nn.Module,
    x_BTD: Float[Array, "B T D"],
    positions_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Runs the layers of `model.config` (a `LayersConfig`), inside the model's `@nn.compact` call.

    Their parameters are `layers/...` of the model, stacked, as in `Transformer`.
    """
    c = model.config
    # The parameters are made by a scan over single layers, whatever the schedule.
    init = model.is_initializing()
    cycle = c.layer_patterns() if c.layer_loop == "unroll" else c.cycle()
    cycle = (c.largest_layer(),) if init else cycle
    repeats = c.num_layers // len(cycle)
    scanned = init or repeats > 1
    scan = functools.partial(
        nn.scan,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=repeats,
    )
    block = Block
    if c.remat != "none" and not init:
        # Inside a scan the compiler cannot merge the recomputation with the forward pass.
        block = nn.remat(Block, policy=REMAT[c.remat], prevent_cse=not scanned)
    if scanned and len(cycle) == 1:
        layers = scan(block)(c, cycle[0], name="layers")
    else:
        layers = nn.map_variables(
            scan(Cycle) if scanned else Cycle,
            "params",
            functools.partial(_to_cycles, size=len(cycle), scanned=scanned),
        )(block, c, cycle, name="layers")
    return layers(x_BTD, positions_BT, segment_ids_BT)[0]


def _to_cycles(variables: PyTree, *, size: int, scanned: bool) -> PyTree:
    """Stacked layers `[L, ...]` as the blocks of a cycle, `[L / size, ...]` each if scanned."""

    def split(x):
        # One split, not many slices: its transpose is one concatenation of the gradients.
        parts = jnp.split(x.reshape(-1, size, *x.shape[1:]), size, axis=1)
        return [p[:, 0] if scanned else p[0, 0] for p in parts]

    leaves, treedef = jax.tree.flatten(variables["params"])
    columns = [split(x) for x in leaves]
    blocks = {f"block_{i}": treedef.unflatten([c[i] for c in columns]) for i in range(size)}
    return {"params": blocks}
