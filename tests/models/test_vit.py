"""The classifier: patches, what each layer sees on the grid, tiles that change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn import patterns
from sparse_attn.masks import stats
from sparse_attn.models import presets, vit
from tests.patterns import on_grid

TINY = vit.VisionTransformerConfig(
    image_shape=(8, 12, 2), num_classes=3, patch=2, num_layers=2, embed_dim=16, num_heads=2,
    mlp_dim=16, impl="reference",
)  # fmt: skip
VIDEO = dataclasses.replace(TINY, image_shape=(4, 6, 8, 1))  # A grid of 2 x 3 x 4.


def with_pattern(config, text, **changes):
    return dataclasses.replace(config, pattern=patterns.parse(text), **changes)


def images_of(config, batch=2):
    images = np.random.default_rng(1).standard_normal((batch, *config.image_shape))
    return jnp.asarray(images, jnp.float32)


def params_of(config):
    # Larger weights, and a head that is not zero, so that every path counts.
    shapes = jax.eval_shape(
        vit.VisionTransformer(config).init, jax.random.key(0), images_of(config)
    )
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), jnp.float32), shapes["params"]
    )


@pytest.mark.parametrize("shape, patch", [((4, 6, 2), (2, 3)), ((4, 4, 6, 1), (2, 1, 3))])
def test_patches_are_row_major_boxes_of_pixels(shape, patch):
    images = np.arange(2 * np.prod(shape), dtype=np.float32).reshape(2, *shape)
    got = np.asarray(vit.patchify(jnp.asarray(images), patch))
    grid = tuple(n // p for n, p in zip(shape, patch, strict=False))
    assert got.shape == (2, np.prod(grid), np.prod(patch) * shape[-1])
    for token, place in enumerate(np.ndindex(*grid)):
        box = tuple(slice(i * p, (i + 1) * p) for i, p in zip(place, patch, strict=True))
        np.testing.assert_array_equal(got[:, token], images[(slice(None), *box)].reshape(2, -1))


@pytest.mark.parametrize(
    "config, text",
    [
        (TINY, "joint(pattern=swin(shape=(4, 6), window_size=2, shift=1), tokens=2)"),
        (VIDEO, "neighborhood(shape=(2, 3, 4), kernel_size=(None, 3, 2))"),
    ],
)
def test_a_layer_sees_exactly_its_pattern(config, text):
    registers = 2 if "joint" in text else None
    config = with_pattern(config, text, num_layers=1, registers=registers)
    model, params, images = vit.VisionTransformer(config), params_of(config), images_of(config, 1)
    count = config.num_tokens

    def outputs(images):
        _, seen = model.apply({"params": params}, images, capture_intermediates=True)
        return seen["intermediates"]["final_norm"]["__call__"][0][0].sum(-1)

    influence = np.abs(jax.jit(jax.jacrev(outputs))(images))[:, 0]  # tokens, *image
    influence = np.asarray(vit.patchify(jnp.asarray(influence), config.patch)).max(-1)
    expected = on_grid.dense(config.pattern, count)[:, registers or 0 :]
    expected[registers or 0 :] |= np.eye(count - (registers or 0), dtype=bool)
    np.testing.assert_array_equal(np.asarray(influence) > 0, expected)


@pytest.mark.parametrize(
    "config, text, tile",
    [
        (TINY, "per_layer((full(), swin(shape=(4, 6), window_size=2, shift=1)))", (2, 3)),
        (VIDEO, "joint(pattern=axial(shape=(2, 3, 4), axes=(0, 1)), tokens=3)", (2, 2, 2)),
    ],
)
def test_tiles_change_nothing_but_the_order(config, text, tile):
    registers = 3 if "joint" in text else None
    config = with_pattern(config, text, registers=registers, rope_base=100.0)
    params, images = params_of(config), images_of(config)
    logits = [
        jax.jit(vit.VisionTransformer(c).apply)({"params": params}, images)
        for c in (config, dataclasses.replace(config, tile=tile, block=8))
    ]
    np.testing.assert_allclose(logits[0], logits[1], atol=2e-4)
    assert np.abs(np.subtract(*np.asarray(logits[0]))).max() > 0.1


def test_tiles_make_neighbours_fewer_blocks():
    config = vit.VisionTransformerConfig(
        image_shape=(64, 64, 3), num_classes=2, patch=2,
        pattern=patterns.parse("neighborhood(shape=(32, 32), kernel_size=7)"),
    )  # fmt: skip
    row_major, tiled = (
        stats.of(c.layer_patterns()[0], q_len=1024, block_q=64, block_kv=64)
        for c in (config, dataclasses.replace(config, tile=8))
    )
    assert row_major.token_density == tiled.token_density == (7 / 32) ** 2
    # A strip of 2 rows sees 8 or 9 rows; an 8 x 8 tile sees 2 or 3 tiles along each axis.
    assert row_major.block_density > 0.25
    assert tiled.block_density == (2 * 2 + 2 * 3) ** 2 / 16**2


def test_parameters_do_not_depend_on_the_pattern():
    shapes = [
        jax.tree.map(jnp.shape, params_of(c))
        for c in (TINY, with_pattern(TINY, "axial(shape=(4, 6), axes=(0,))", tile=2, num_layers=2))
    ]
    assert shapes[0] == shapes[1]
    assert shapes[0]["patch_embedding"]["kernel"] == (2 * 2 * 2, 16)
    assert shapes[0]["position"] == (24, 16)
    assert shapes[0]["head"]["kernel"] == (16, 3)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_runs(name):
    preset = presets.PRESETS[name]
    config = VIDEO if preset.axes == 3 else TINY
    schedule = presets.schedule(name, config.grid, window=2, num_heads=4)
    config = dataclasses.replace(
        config, num_heads=4, pattern=schedule, num_layers=len(schedule.patterns),
        registers=preset.registers,
    )  # fmt: skip
    model, images = vit.VisionTransformer(config), images_of(config)
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert jax.eval_shape(model.apply, variables, images).shape == logits.shape == (2, 3)


def test_images_of_another_shape_are_refused():
    model = vit.VisionTransformer(TINY)
    with pytest.raises(ValueError, match=r"images of shape \(8, 8, 2\) must be \(8, 12, 2\)"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 2)))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(image_shape=(8, 8)), r"image_shape=\(8, 8\) must be \(height, width, channels\)"),
        (dict(patch=3), "patch=3 must divide image_shape"),
        (dict(num_classes=0), "num_classes=0 must be >= 1"),
        (dict(tile=(2, 2, 2)), r"tile=\(2, 2, 2\) must have one int per axis"),
        (dict(pattern="axial(shape=(4, 4), axes=(0,))"), r"must have shape=\(4, 6\)"),
        (
            dict(pattern="axial(shape=(4, 6), axes=(0,))", registers=1),
            r"must be joint\(..., tokens=1\) for registers=1; it has a prefix of 0",
        ),
        (
            dict(pattern="per_head((full(), joint(axial(shape=(4, 6), axes=(0,)), tokens=1)))"),
            "it has a prefix of 1",
        ),
    ],
)
def test_mistakes_are_named(changes, message):
    if "pattern" in changes:
        changes = changes | {"pattern": patterns.parse(changes["pattern"])}
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)
