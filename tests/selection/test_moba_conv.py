"""MoBA with mixed keys: its definition, the gradient of the taps, and routing by block size."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.ops import attend as attend_lib
from sparse_attn.selection import moba, moba_conv
from tests.selection import rules
from tests.selection.test_moba import by_definition


def test_output_is_the_definition_on_mixed_keys_and_taps_have_its_gradient():
    q, k, v = rules.inputs(batch=1, length=20)
    rule = moba_conv.MobaConv(block_kv=8, top_k=1)
    taps = {"key_conv": jnp.asarray(rules.params(rule, q, k)["key_conv"])}
    mixed = moba_conv.mix(k, taps["key_conv"])
    mask = rules.select(moba.Moba(block_kv=8, top_k=1), q, mixed)

    def own(taps):
        return rule.attend(q, k, v, params=taps, impl="reference")

    def masked(taps):
        keys = moba_conv.mix(k, taps["key_conv"])
        return attend_lib.attend(q, keys, v, mask=mask, impl="reference")

    got, want = (
        jax.jit(
            jax.value_and_grad(
                lambda t, f=f: (lambda out: ((out**2).sum(), out))(f(t)), has_aux=True
            ),
            compiler_options=rules.COMPILER_OPTIONS,
        )(taps)
        for f in (own, masked)
    )
    np.testing.assert_allclose(got[0][1], by_definition(q, mixed, v, 8, 1), atol=2e-5)
    got, want = got[1]["key_conv"], want[1]["key_conv"]
    np.testing.assert_allclose(got, want, atol=1e-3)
    assert jnp.abs(got).max() > 0.1


def test_mixing_is_causal_and_stays_in_its_document():
    _, k, _ = rules.inputs(1, batch=1, length=12)
    taps = jnp.ones((2, 3, 8))
    ids = jnp.array([[1] * 5 + [2] * 7])
    changed = moba_conv.mix(k.at[:, 4].add(1.0), taps) - moba_conv.mix(k, taps)
    touched = np.abs(changed).max((0, 2, 3)) > 0
    assert touched.tolist() == [4 <= t < 7 for t in range(12)]
    changed = moba_conv.mix(k.at[:, 4].add(1.0), taps, ids) - moba_conv.mix(k, taps, ids)
    assert (np.abs(changed).max((0, 2, 3)) > 0).tolist() == [t == 4 for t in range(12)]


@pytest.mark.slow
def test_routing_follows_the_signal_to_noise_ratio_and_small_blocks_find_more():
    # Unit keys in random directions and one key of length `gap` along the query, as in the model.
    trials, length, dim, gap = 300, 1024, 32, 4.0
    rng = np.random.default_rng(0)
    k = rng.standard_normal((trials, length, dim)).astype(np.float32)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    q = rng.standard_normal((trials, dim)).astype(np.float32)
    q /= np.linalg.norm(q, axis=-1, keepdims=True)
    k[:, 5] = gap * q
    q, k = jnp.asarray(q)[:, None, None], jnp.asarray(k)[:, :, None]
    recalls = []
    for block in (256, 128, 64):
        rule = moba.Moba(block_kv=block, top_k=256 // block)  # 256 tokens are seen in all cases.
        blocks = rule._blocks(np.ones((1, length // block), int), q, k, None, None)
        scores = np.asarray(rule.scores(q, k, blocks))[:, 0, 0]
        wins = (scores[:, 0] > scores[:, 1]).mean()
        want = 0.5 * (1 + math.erf(moba_conv.snr(gap, dim, block) / math.sqrt(2)))
        assert abs(wins - want) < 3 * math.sqrt(want * (1 - want) / trials)
        place = (scores[:, 1:] > scores[:, :1]).sum(1)
        recalls.append((place < rule.top_k).mean())
    assert recalls[0] + 0.05 < recalls[1] < recalls[2] - 0.05
