import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.masks import curves, reorder
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import reordered
from sparse_attn.patterns import axial, circular, joint, neighborhood, per_head, swin

SHAPE = (6, 8)
NEAR = neighborhood.Neighborhood(SHAPE, (3, 5))
ORDERS = (
    reorder.Tiles(SHAPE, (2, 4)),
    reorder.Tiles(SHAPE, (4, 3), (1, 0)),  # ragged: by indices, not by transposes
    reorder.Tiles(SHAPE, (3, 2), dilation=(2, 2)),
    curves.Hilbert(SHAPE),
    curves.Gilbert(SHAPE),
)
BIAS = jnp.asarray(np.random.default_rng(1).standard_normal((2, 4, 48)), jnp.float32)
SINKS = jnp.asarray([0.0, 1, 2, 3])


def qkv(length, heads=2, kv_heads=2, batch=2, dim=8):
    rng = np.random.default_rng(0)
    return tuple(
        jnp.asarray(rng.standard_normal((batch, length, n, dim)), jnp.float32)
        for n in (heads, kv_heads, kv_heads)
    )


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: str(o.spec))
@pytest.mark.parametrize("prefix", [0, 5])
def test_permute_and_back(order, prefix):
    x = np.arange(2 * (prefix + 96)).reshape(2, -1)
    moved = reordered.permute(jnp.asarray(x), order, prefix=prefix)
    want = x[:, reordered.places(order, prefix + 96, prefix)]
    np.testing.assert_array_equal(moved, want)
    np.testing.assert_array_equal(reordered.unpermute(moved, order, prefix=prefix), x)


def test_tiles_that_divide_the_grid_move_without_a_gather():
    def primitives(order):
        jaxpr = jax.make_jaxpr(lambda x: reordered.permute(x, order))(jnp.zeros((1, 48, 2)))
        return {equation.primitive.name for equation in jaxpr.eqns}

    assert "gather" not in str(primitives(ORDERS[0]) | primitives(ORDERS[2]))
    assert primitives(ORDERS[0]) <= {"reshape", "transpose", "slice"}


@pytest.mark.parametrize(
    "order", [ORDERS[1], pytest.param(ORDERS[4], marks=pytest.mark.slow)], ids=lambda o: str(o.spec)
)
def test_output_lse_and_gradients_are_those_of_row_major_tokens(order):
    q, k, v = qkv(48, heads=4)

    def loss(run):
        def total(q, k, v):
            out, lse = run(q, k, v)
            return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum() + lse.sum()

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, k, v)

    got = loss(lambda *x: reordered.attend_reordered(*x, mask=NEAR, order=order, return_lse=True))
    want = loss(lambda *x: attend_lib.attend(*x, mask=NEAR, return_lse=True, impl="reference"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4), got, want)


def test_a_prefix_stays_in_front_and_several_grids_keep_apart():
    pattern = joint.Joint(circular.Circular(SHAPE, 2), tokens=5)
    q, k, v = qkv(5 + 96)
    out = reordered.attend_reordered(q, k, v, mask=pattern, order=ORDERS[0])
    want = attend_lib.attend(q, k, v, mask=pattern, impl="reference")
    np.testing.assert_allclose(out, want, atol=1e-5)


def test_segments_biases_and_sinks_move_along():
    q, k, v = qkv(48, heads=4)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 48)), jnp.int32)
    arguments = {
        "mask": NEAR,
        "segment_ids": ids,
        "key_bias": BIAS,
        "sink_logits": SINKS,
        "logits_soft_cap": 5.0,
        "scale": 0.3,
    }
    out = reordered.attend_reordered(q, k, v, order=ORDERS[1], **arguments)
    want = attend_lib.attend(q, k, v, impl="reference", **arguments)
    np.testing.assert_allclose(out, want, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_heads_with_orders_of_their_own(kv_heads):
    """As PARO chooses them: one axis order per head, here with patterns per head too."""
    q, k, v = qkv(48, heads=4, kv_heads=kv_heads)
    rows, columns = axial.Axial(SHAPE, (1,)), axial.Axial(SHAPE, (0,))
    masks = per_head.PerHead((rows, columns, columns, rows))
    orders = [reordered.best_order(m, reordered.axis_orders(SHAPE), block_q=8, block_kv=8)
              for m in masks.patterns]  # fmt: skip
    assert [o.axes for o in orders] == [(0, 1), (1, 0), (1, 0), (0, 1)]
    out, lse = reordered.attend_reordered(
        q, k, v, mask=masks, order=orders, return_lse=True,
        key_bias=BIAS, sink_logits=SINKS,
    )  # fmt: skip
    want, want_lse = attend_lib.attend(
        q, k, v, mask=masks, return_lse=True, impl="reference",
        key_bias=BIAS, sink_logits=SINKS,
    )  # fmt: skip
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


def test_best_of_six_orders_for_a_head_that_is_local_in_time():
    shape = (8, 4, 8)
    orders = reordered.axis_orders(shape)
    assert len(orders) == 6
    through_time = axial.Axial(shape, (0,))
    best = reordered.best_order(through_time, orders, block_q=8, block_kv=8)
    assert best.axes[-1] == 0  # frames fastest

    def blocks(order):
        at = order.forward
        mask = through_time.mask_fn(at[:, None], at).reshape(32, 8, 32, 8)
        return mask.any((1, 3)).sum()

    assert blocks(best) == min(blocks(o) for o in orders) == 32


def test_it_runs_under_jit_and_with_windows_of_the_whole_grid():
    q, k, v = qkv(48)
    dense = swin.Swin(SHAPE, None)
    run = jax.jit(lambda *x: reordered.attend_reordered(*x, mask=dense, order=ORDERS[3]))
    want = attend_lib.attend(q, k, v, mask=dense, impl="reference")
    np.testing.assert_allclose(run(q, k, v), want, atol=1e-5)


@pytest.mark.parametrize(
    "length, arguments, message",
    [
        (50, {"mask": NEAR, "order": ORDERS[0]}, "must divide the 50 tokens less the prefix of 0"),
        (48, {"mask": NEAR, "order": ORDERS[:3]}, "must be a Reordering, or one per head of q"),
        (48, {"mask": (NEAR,), "order": ORDERS[0]}, "must be a Pattern, or one per head of q"),
        (49, {"mask": (NEAR, joint.Joint(NEAR, 1)), "order": ORDERS[0]}, "must have one prefix"),
    ],
)
def test_wrong_arguments(length, arguments, message):
    with pytest.raises(ValueError, match=message):
        reordered.attend_reordered(*qkv(length), **arguments)


def test_a_table_takes_one_grid():
    with pytest.raises(NotImplementedError, match="has no closed form: one grid"):
        reordered.attend_reordered(*qkv(96), mask=NEAR, order=ORDERS[4])
