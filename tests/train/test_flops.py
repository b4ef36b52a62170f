"""FLOPs against closed forms, and a utilization that cannot be is called a bug."""

import logging

import jax
import pytest

from sparse_attn.models import transformer
from sparse_attn.patterns import causal, local, per_layer
from sparse_attn.train import flops, metrics
from sparse_attn.train import state as state_lib
from tests.train import tiny

T, B, D, N, K, H, F, L, V = 64, 2, 16, 2, 1, 8, 32, 2, 384


def config(**changes):
    fields = dict(
        vocab_size=V, num_layers=L, embed_dim=D, num_heads=N, num_kv_heads=K, head_dim=H,
        mlp_dim=F, pattern=causal.Causal(), block=16,
    )  # fmt: skip
    return transformer.TransformerConfig(**(fields | changes))


def params_of(c):
    optimizer = tiny.optimizer()
    model = transformer.Transformer(c)
    make = lambda: state_lib.create(model, optimizer, key=jax.random.key(0), length=T)  # noqa: E731
    return jax.eval_shape(make).params


def utilization(c, num_devices=1):
    return flops.utilization(
        c,
        params_of(c),
        context=T,
        batch_size=B,
        device_kind="TPU v5 lite",
        num_devices=num_devices,
    )


LAYER = 2 * D * N * H + 2 * D * K * H + 3 * D * F  # Weights that multiply a token.


@pytest.mark.parametrize("output", ["tied", "untied"])
def test_matmul_params(output):
    assert flops.matmul_params(params_of(config(output=output))) == {
        "layers": L * LAYER, "output": V * D,
    }  # fmt: skip


def test_useful_and_executed_flops_of_a_causal_step():
    used = utilization(config(), num_devices=4)
    pairs, block_pairs = T * (T + 1) / 2, 10 * 16**2  # 4 + 3 + 2 + 1 blocks of 16 x 16.
    weights = 6 * (L * LAYER + V * D)  # Forward 2, backward 4 per weight and token.
    per_pair = 3.5 * 4 * H * N * L  # Two products forward, five backward.
    assert used.useful_per_token == pytest.approx(weights + per_pair * pairs / T)
    assert used.executed_per_step == pytest.approx(B * (T * weights + per_pair * block_pairs))
    assert used.peak == 4 * 197e12


def test_what_remat_computes_again_is_executed_but_not_useful():
    plain, block, dots = (utilization(config(remat=r)) for r in ("none", "block", "dots"))
    assert plain.useful_per_token == block.useful_per_token == dots.useful_per_token
    attention = B * 4 * H * N * L * 10 * 16**2
    assert dots.executed_per_step - plain.executed_per_step == pytest.approx(attention)
    layers = 2 * B * T * L * LAYER
    assert block.executed_per_step - plain.executed_per_step == pytest.approx(attention + layers)


def test_a_sparse_mask_needs_less_and_layers_add_up():
    window = local.Local(window=16)
    dense, sparse = utilization(config()), utilization(config(pattern=window))
    mixed = utilization(config(pattern=per_layer.PerLayer((causal.Causal(), window))))
    assert sparse.executed_per_step < dense.executed_per_step
    for name in ("useful_per_token", "executed_per_step"):
        mean = (getattr(dense, name) + getattr(sparse, name)) / 2
        assert getattr(mixed, name) == pytest.approx(mean)


def test_padding_is_not_useful_but_executed():
    used = flops.Utilization(useful_per_token=10.0, executed_per_step=2000.0, peak=1e4)
    whole = used.of(metrics.Window(tokens=100, steps=1, seconds=1.0))
    half = used.of(metrics.Window(tokens=50, steps=1, seconds=1.0))
    assert half["perf/mfu_useful"] == whole["perf/mfu_useful"] / 2 == 0.05
    assert half["perf/mfu_executed"] == whole["perf/mfu_executed"] == 0.2


def test_above_the_peak_is_a_bug(caplog):
    used = flops.Utilization(useful_per_token=1.0, executed_per_step=150.0, peak=100.0)
    with caplog.at_level(logging.ERROR):
        used.of(metrics.Window(tokens=99, steps=1, seconds=1.5))
        assert not caplog.records
        used.of(metrics.Window(tokens=99, steps=1, seconds=1.0))
    (record,) = caplog.records
    assert record.getMessage().startswith("perf/mfu_executed is 150 % of the peak: this is a bug")


def test_unknown_hardware_has_no_utilization():
    c = config()
    assert flops.utilization(
        c, params_of(c), context=T, batch_size=B, device_kind="cpu", num_devices=1,
    ) is None  # fmt: skip
