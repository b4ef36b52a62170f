"""A classifier of images and videos: patches as tokens of a grid, a grid pattern per layer."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_attn.masks import grids, reorder
from sparse_attn.models import dtypes, transformer
from sparse_attn.ops import reordered
from sparse_attn.patterns import base, full, joint, per_head, per_layer, permuted


@dataclasses.dataclass(frozen=True)
class VisionTransformerConfig(transformer.LayersConfig):
    """The shape of a `VisionTransformer`: its layers, its images and its classes.

    Attributes:
      image_shape: (height, width, channels), or (frames, height, width, channels) of a video.
      num_classes: C.
      patch: pixels (and frames) of a patch along each axis, an int or one per axis.
      registers: R, learned tokens in front of the patches, for patterns with a prefix (`joint`);
        None = none.
      tile: tokens per tile along each axis of the grid, an int or one per axis: all layers run on
        tokens in tile order (`masks.reorder.Tiles`), where windows of neighbours are fewer blocks.
        The result is the same. None = row-major.
      pattern: as in `LayersConfig`, on the R registers and then the patches in row-major order,
        whatever the tile; the default sees everything.
      rope_base: of rotations by the row-major place; None = learned positions alone.

    Raises:
      ValueError: a patch does not divide its axis, or as `LayersConfig`.
    """

    image_shape: tuple[int, ...] = dataclasses.field(kw_only=True)
    num_classes: int = dataclasses.field(kw_only=True)
    patch: int | tuple[int, ...] = 1
    registers: int | None = None
    tile: int | tuple[int, ...] | None = None
    pattern: Any = dataclasses.field(default_factory=full.Full)
    rope_base: float | None = None

    def __post_init__(self):
        super().__post_init__()
        self._check_positive("num_classes")
        if self.registers is not None:
            self._check_positive("registers")
        shape = tuple(self.image_shape)
        if len(shape) not in (3, 4) or min(shape) < 1:
            raise ValueError(
                f"image_shape={shape} must be (height, width, channels) or (frames, height, width, "
                "channels)"
            )
        patch = _per_axis(self.patch, len(shape) - 1)
        if len(patch) != len(shape) - 1 or any(
            p < 1 or n % p for n, p in zip(shape, patch, strict=False)
        ):
            raise ValueError(f"patch={self.patch} must divide image_shape={shape} along every axis")
        object.__setattr__(self, "image_shape", shape)
        reorder.Tiles(self.grid, self.tile)  # Raises for a wrong tile.
        for pattern in self._heads():
            self._check_pattern(pattern)

    def _heads(self):
        schedule = self.pattern
        layers = schedule.patterns if isinstance(schedule, per_layer.PerLayer) else (schedule,)
        return [
            head
            for x in layers
            for head in (x.patterns if isinstance(x, per_head.PerHead) else [x])
        ]

    def _check_pattern(self, pattern):
        prefix = pattern.tokens if isinstance(pattern, joint.Joint) else 0
        for leaf in _leaves(pattern):
            if not isinstance(leaf, grids.GridPattern):
                continue
            if leaf.shape != self.grid:
                raise ValueError(
                    f"pattern={leaf.expression()} must have shape={self.grid}, the grid of patches"
                )
            if prefix != (self.registers or 0):
                raise ValueError(
                    f"pattern={pattern.expression()} must be joint(..., tokens={self.registers}) "
                    f"for registers={self.registers}; it has a prefix of {prefix}"
                )

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches along each axis.

        >>> config = VisionTransformerConfig(image_shape=(8, 28, 28, 1), num_classes=2, patch=4)
        >>> config.grid, config.num_tokens
        ((2, 7, 7), 98)
        """
        sizes = self.image_shape[:-1]
        return tuple(n // p for n, p in zip(sizes, _per_axis(self.patch, len(sizes)), strict=True))

    @property
    def num_tokens(self) -> int:
        """Tokens of a row: registers and patches."""
        return math.prod(self.grid) + (self.registers or 0)

    @property
    def order(self) -> reorder.Tiles:
        """The order that the patches run in."""
        return reorder.Tiles(self.grid, self.tile)

    def layer_patterns(self) -> tuple[base.Pattern | per_head.PerHead, ...]:
        """The pattern of each layer, on tokens in the order that they run in.

        >>> from sparse_attn.patterns import swin
        >>> config = VisionTransformerConfig(
        ...     image_shape=(8, 8, 1), num_classes=2, tile=4, num_layers=1,
        ...     pattern=swin.Swin(shape=(8, 8), window_size=4))
        >>> config.layer_patterns()[0].order[:3]
        ('tiles', (8, 8), (4, 4))
        """
        patterns = super().layer_patterns()
        if self.tile is None:
            return patterns
        # What sees everything does so in any order, and stays one block state for all blocks.
        return tuple(
            p if isinstance(p, full.Full) else permuted.permute(p, self.order) for p in patterns
        )


class VisionTransformer(nn.Module):
    """Linear patches, learned positions, layers, mean over patches, linear classes.

    A ViT [arXiv:2010.11929, sec. 3.1] with the layers of `Transformer` and mean pooling in place
    of a class token. The parameters do not depend on patterns or tiles. Paths and shapes (float32),
    with P numbers per patch and T patches:

        patch_embedding/kernel   [P, D]       position   [T, D]
        registers                [R, D]       if there are any
        layers/...               as in `Transformer`
        final_norm/scale         [D]          head/kernel, head/bias   [D, C], [C]

    >>> import jax
    >>> config = VisionTransformerConfig(image_shape=(8, 8, 1), num_classes=10, patch=2)
    >>> images = jnp.zeros((3, 8, 8, 1))
    >>> model = VisionTransformer(config)
    >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    >>> logits.shape, variables["params"]["position"].shape
    ((3, 10), (16, 128))
    """

    config: VisionTransformerConfig

    @nn.compact
    def __call__(self, images: Float[Array, "B *image"]) -> Float[Array, "B C"]:
        """Logits (float32) of the classes.

        Raises:
          ValueError: the images do not have the config's shape.
        """
        c, dtype = self.config, dtypes.of(self.config.dtype)
        if images.shape[1:] != c.image_shape:
            raise ValueError(f"images of shape {images.shape[1:]} must be {c.image_shape}")
        patches_BTP = patchify(images.astype(dtype), c.patch)
        x_BTD = nn.Dense(c.embed_dim, use_bias=False, dtype=dtype, name="patch_embedding")(
            patches_BTP
        )
        init = nn.initializers.normal(0.02)
        position_TD = self.param("position", nn.initializers.normal(0.5), x_BTD.shape[1:])
        x_BTD = x_BTD + position_TD.astype(dtype)
        places_T = jnp.arange(c.num_tokens)
        registers = c.registers or 0
        if registers:
            registers_RD = self.param("registers", init, (registers, c.embed_dim)).astype(dtype)
            first = jnp.broadcast_to(registers_RD, (len(x_BTD), *registers_RD.shape))
            x_BTD = jnp.concatenate([first, x_BTD], 1)
        if c.tile is not None:
            # Once for all layers; the mean at the end does not ask for the order.
            x_BTD = reordered.permute(x_BTD, c.order, prefix=registers)
            places_T = jnp.asarray(reordered.places(c.order, c.num_tokens, registers))
        places_BT = jnp.broadcast_to(places_T, x_BTD.shape[:2])
        x_BTD = transformer.apply_layers(self, x_BTD, places_BT)
        x_BTD = transformer.RMSNorm(dtype, name="final_norm")(x_BTD)
        mean_BD = x_BTD[:, registers:].astype(jnp.float32).mean(1)
        return nn.Dense(c.num_classes, kernel_init=nn.initializers.zeros, name="head")(mean_BD)


def patchify(
    images: Float[Array, "B *image"], patch: int | tuple[int, ...]
) -> Float[Array, "B T P"]:
    """Cuts images `[B, (frames,) height, width, channels]` into patches, in row-major order.

    >>> patchify(jnp.arange(16.0).reshape(1, 4, 4, 1), (2, 2))[0, 1].tolist()
    [2.0, 3.0, 6.0, 7.0]
    """
    batch, *sizes, channels = images.shape
    patch = _per_axis(patch, len(sizes))
    split = [x for n, p in zip(sizes, patch, strict=True) for x in (n // p, p)]
    counts = range(1, 2 * len(patch), 2)
    x = images.reshape(batch, *split, channels)
    x = x.transpose(0, *counts, *(a + 1 for a in counts), x.ndim - 1)
    tokens = math.prod(n // p for n, p in zip(sizes, patch, strict=True))
    return x.reshape(batch, tokens, math.prod(patch) * channels)


def _per_axis(value, axes):
    return (value,) * axes if isinstance(value, int) else tuple(value)


def _leaves(pattern):
    """The patterns that an expression consists of."""
    match pattern:
        case base.And(a=a, b=b) | base.Or(a=a, b=b):
            return [*_leaves(a), *_leaves(b)]
        case base.Not(a=inner) | joint.Joint(pattern=inner) | permuted.Permuted(pattern=inner):
            return _leaves(inner)
    return [pattern]
