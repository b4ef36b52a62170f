"""The recall study: its dense layers compute what the library's ops compute, and recall works."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.recall import dense, mqar_gpu, report
from sparse_attn.data.synthetic import needle
from sparse_attn.models.mixers import nsa
from sparse_attn.ops import attend as attend_lib
from sparse_attn.viz import reach

SELECTED = [m for m in dense.METHODS if not dense.is_static(dense.rule_of(m))]
STATIC = [m for m in dense.METHODS if m not in SELECTED]


def _arrays(length=48):
    arrays = np.random.default_rng(0).standard_normal((3, 2, length, 1, 16))
    return tuple(jnp.asarray(arrays, jnp.float32))


_attend = jax.jit(dense.attend)
_chosen = jax.jit(dense.chosen, static_argnums=0)
# Layers and models of one kind are one program for all methods: the mask is an argument.
_init = jax.jit(lambda model, *args: model.init(jax.random.key(0), *args), static_argnums=0)
_apply = jax.jit(lambda model, *args: model.apply(*args), static_argnums=0)


@pytest.mark.parametrize("method", [m for m in dense.METHODS if m != "NSA"])
def test_dense_attention_is_the_library_s(method):
    q, k, v = _arrays()
    rule = dense.rule_of(method)
    mask = np.asarray(dense.mask_of(rule, q.shape[1]))
    if method in SELECTED:
        expected = attend_lib.attend(q, k, v, mask=rule.select(q, k), impl="reference")
        places = np.broadcast_to(np.arange(q.shape[1]), q.shape[:2])
        allowed, mask = mask, np.asarray(_chosen(rule, q, k, mask, places))
        assert not mask.all(where=allowed)  # something is left out
    else:
        expected = attend_lib.attend(q, k, v, mask=rule, impl="reference")
    np.testing.assert_allclose(_attend(q, k, v, mask)[0], expected, atol=2e-5)


def test_dense_nsa_is_the_layer():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 48, 16)), jnp.float32)
    fields = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 16, "rope_base": None}
    layer = dense.rule_of("NSA").layer(impl="reference", **fields)
    params = _init(layer, x)
    places = np.array([[47, 3, 20], [0, 8, 31]])
    ours = dense.DenseNsa(rule=dense.rule_of("NSA"), **fields, places=places)
    assert isinstance(layer, nsa.NativeSparseAttention)
    found = jax.jit(lambda x: dense.at_places(ours.apply(params, x), places))(x)
    expected = dense.at_places(_apply(layer, params, x), places)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("method", ["sinks + window 16", "MoBA", "pooled top-k"])
def test_some_queries_get_what_all_get(method):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 48, 16)), jnp.float32)
    rule = dense.rule_of(method)
    mask = dense.mask_of(rule, 48)
    layer = dense.Attention(None if dense.is_static(rule) else rule, 1, jnp.float32, 1.0)
    everywhere, some = np.broadcast_to(np.arange(48), (2, 48)), np.array([[47, 3], [0, 31]])
    params = _init(layer, x, mask, everywhere)
    expected = dense.at_places(_apply(layer, params, x, mask, everywhere), some)
    np.testing.assert_allclose(_apply(layer, params, x, mask, some), expected, atol=2e-5)


def test_all_but_the_embedding_learns_slower_in_wider_models():
    cell, setting = mqar_gpu.Cell("full", 16, 32), mqar_gpu.Setting.tiny("convolution")
    data, seeds = mqar_gpu.data_of(16, setting)["train"], len(mqar_gpu.SEEDS)
    rows, mask = np.zeros((1, seeds, setting.batch), np.int32), np.tri(16, dtype=bool)

    def moved(base_width):
        start, train, _ = mqar_gpu.programs(cell, setting._replace(base_width=base_width))
        before = jax.jit(start)(np.arange(seeds))
        rates = np.asarray(mqar_gpu.RATES, np.float32)
        after = jax.jit(train)(before, data, rows, np.ones(1, np.float32), rates, mask)
        steps = jax.tree.map(lambda a, b: np.asarray(a - b), after[0], before[0])
        return steps["embedding"], steps["mixer_1"]["value"]["kernel"]

    (table, value), (slow_table, slow_value) = moved(None), moved(16)
    np.testing.assert_array_equal(table, slow_table)
    np.testing.assert_allclose(slow_value, value / 2, atol=1e-6)
    assert np.abs(value).max() > 1e-4


def test_a_query_that_sees_nothing():
    q, k, v = _arrays(4)
    mask = np.tri(4, k=-1, dtype=bool)
    out, lse = map(np.asarray, _attend(q, k, v, mask))
    assert not out[:, 0].any()
    assert (lse[:, 0] == -np.inf).all()
    grads = jax.jit(jax.grad(lambda q: dense.attend(q, k, v, mask)[0].sum()))(q)
    assert np.isfinite(grads).all()


def test_batches_are_drawn_as_examples_are():
    setting = mqar_gpu.Setting.tiny("attention")
    data = mqar_gpu.data_of(64, setting)["train"]
    inputs, places, answers = (data[name][0] for name in ("inputs", "places", "answers"))
    keys = np.take_along_axis(inputs, places, 1)
    np.testing.assert_array_equal(keys, inputs[:, 0:8:2])
    np.testing.assert_array_equal(answers, inputs[:, 1:8:2])
    assert (answers >= 64).all()
    assert (keys < 64).all()
    assert (keys > 0).all()
    assert all(len(set(row)) == 4 for row in places)
    assert (places % 2 == 0).all()
    assert not (data["inputs"][0] == data["inputs"][1]).all()  # another seed, other data


@pytest.mark.parametrize("first", ["convolution", "attention"])
def test_tiny_grid_resumes(tmp_path, capsys, first):
    arguments = ["--tiny", "--out", str(tmp_path), "--methods", "window 16", "--first", first]
    assert mqar_gpu.main(arguments) == 0
    results = json.loads((tmp_path / f"mqar_{first}.json").read_text())["results"]
    assert results["setting"]["first_layer"] == first
    (cell,) = results["cells"]
    assert cell["steps"] == 8
    assert np.shape(cell["by_seed_and_rate"]) == (3, 4)
    done = {mqar_gpu.Cell("full", 256, 128)}
    left = mqar_gpu.plan([256], [128], ["full", "MoBA"], done)
    assert left == [mqar_gpu.Cell("MoBA", 256, 128)]
    assert "0 cells left" in capsys.readouterr().out
    assert report.main(["--results", str(tmp_path)]) == 0
    table = (tmp_path / f"mqar_{first}.md").read_text()
    assert f"; {first} first; 8 steps" in table
    assert "| window 16 | 0.22" in table
    assert " | 14.1 " in table
    assert (tmp_path / f"mqar_{first}.png").stat().st_size > 5000
    assert "| 64     | 0.51      | 0.5" in (tmp_path / "mqar_published.md").read_text()
    assert report.main(["--results", str(tmp_path / "none")]) == 1


def test_resuming_refuses_another_setting(tmp_path, capsys):
    setting = mqar_gpu.Setting("attention", steps=12_000)
    path = tmp_path / "mqar_attention.json"
    path.write_text(json.dumps({"results": {"setting": setting._asdict(), "cells": []}}))
    arguments = ["--out", str(tmp_path), "--resume", str(path)]
    assert mqar_gpu.main([*arguments, "--steps", "12000", "--lengths"]) == 0  # No cells.
    with pytest.raises(SystemExit):
        mqar_gpu.main([*arguments, "--first", "convolution"])
    assert "first_layer='attention', not 'convolution'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        mqar_gpu.main([*arguments, "--tiny"])
    assert "--tiny has sizes of its own" in capsys.readouterr().err


def test_a_convolution_puts_the_tokens_before_into_a_token_and_places_do_not_matter():
    """With nothing to attend to but itself, a token knows two before it and not where it stands."""
    model = dense.Recaller(
        rule=None, vocab_size=48, width=16, dtype=jnp.float32, first_layer="convolution"
    )
    tokens, mask = np.arange(1, 13)[None] % 7, np.eye(12, dtype=bool)
    places = np.arange(12)[None]
    params = _init(model, tokens, places, mask)
    logits = np.asarray(_apply(model, params, tokens, places, mask))[0]
    other = tokens.copy()
    other[0, 5] = 40
    changed = np.abs(np.asarray(_apply(model, params, other, places, mask))[0] - logits).max(-1) > 0
    assert np.nonzero(changed)[0].tolist() == [5, 6, 7]
    np.testing.assert_allclose(logits[3], logits[10], atol=1e-6)  # 2, 3, 4 end at both.
    with pytest.raises(ValueError, match="first_layer='conv' must be one of"):
        _init(model.clone(first_layer="conv"), tokens, places, mask)


@pytest.mark.parametrize("method", STATIC)
def test_a_needle_counts_exactly_where_the_receptive_field_says(method):
    # The answer is drawn without regard to the rest: a model whose output at the question does not
    # change with the needle's value is at chance there, however it was trained.
    task = needle.Needle(vocab_size=48, length=96, depth=0.0)
    rule = dense.rule_of(method)
    model = dense.Recaller(rule=None, vocab_size=48, width=16, dtype=jnp.float32)
    mask, last = np.asarray(dense.mask_of(rule, task.length)), np.full((1, 1), task.length - 1)
    tokens = np.asarray(task.example(np.random.default_rng(0))["inputs"])[None]
    params = _init(model, tokens, last, mask)
    # One row per place of a value, with that value changed.
    places = np.arange(1, task.length - 1, 2)
    others = np.repeat(tokens, len(places), 0)
    others[np.arange(len(places)), places] = (others[0, places] + 1) % 48
    rows = np.concatenate([tokens, others])
    logits = np.asarray(_apply(model, params, rows, np.repeat(last, len(rows), 0), mask))
    changed = np.abs(logits[1:] - logits[:1]).max((1, 2)) > 0
    field = reach.receptive_field(rule, task.length, num_layers=model.num_layers)
    np.testing.assert_array_equal(changed, field.reached[-1, places])
    assert changed.all() == (method in ("full", "window 64"))
