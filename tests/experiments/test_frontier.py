"""The frontier study: what it counts, that it goes on where it stopped, and its report."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.frontier import report, study
from experiments.recall import side_by_side
from sparse_attn.patterns import causal
from sparse_attn.selection import pooled


def test_the_share_of_pairs_is_that_of_the_dense_mask():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 24, 2, 8))
    mask = jax.jit(pooled.Pooled(block_q=4, block_kv=4, top_k=2).select)(q, k)
    counts = np.asarray(mask.kv_counts).reshape(mask.num_tables, -1)
    lists = np.asarray(mask.kv_indices).reshape(mask.num_tables, counts.shape[1], -1)
    dense = np.zeros((mask.num_tables, 24, 24), bool)
    for table, row in np.ndindex(counts.shape):
        for column in lists[table, row, : counts[table, row]]:
            dense[table, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = True
    seen = (dense & np.tri(24, dtype=bool)).sum() / mask.num_tables
    assert float(study.share_of(mask)) == pytest.approx(seen / (24 * 25 / 2))
    assert seen < 24 * 25 / 2


@pytest.mark.parametrize("name", study.RULES)
@pytest.mark.parametrize("budget", [8, 32])
def test_rules_keep_about_their_budget(name, budget):
    rule = study.rule_of(name, budget)
    if name == "vertical_slash":
        assert rule.columns == rule.diagonals == (1 if budget == 8 else 3)
        return
    if name == "window and sinks":
        at = np.arange(96)
        assert rule.mask_fn(at[:, None], at).sum(1)[-1] == budget
    else:
        assert np.asarray(rule.at_most(96).kv_counts).max() * 4 == budget


def test_dense_is_the_model_that_was_trained():
    assert study.model_of(8, study.rule_of("dense", 0)) == study.model_of(8)
    assert study.model_of(8).config.pattern == causal.Causal()
    assert study.forward_flops(study.model_of(8), 100, 4, 1.0) == 2 * 100 * 4 + 4 * 8 * 2 * 10


def logits_of(model, params, data):
    run = jax.jit(jax.vmap(lambda params, rows: model.apply({"params": params}, rows)))
    return run(params, data["inputs"])


@pytest.fixture(scope="module")
def dense():
    """Drawn parameters `[tasks, ...]`, the study's rows of 32 tokens, logits of the dense model."""
    model, data = study.model_of(8), next(study.batches(32, 8, split="test"))
    example, keys = jnp.zeros((1, 32), jnp.int32), jax.random.split(jax.random.key(0), 3)
    params = jax.jit(jax.vmap(lambda key: model.init(key, example)["params"]))(keys)
    return params, data, logits_of(model, params, data)


@pytest.mark.slow  # Three programs each.
@pytest.mark.parametrize("name", study.RULES)
def test_a_budget_of_the_whole_row_is_dense(name, dense):
    params, data, expected = dense
    # Lines may cross blocks that others cross: only one at every key is sure to cover all.
    whole = 3 * study.BLOCK * 32 if name == "vertical_slash" else 32
    model, less = (study.model_of(8, study.rule_of(name, n)) for n in (whole, 8))
    np.testing.assert_allclose(logits_of(model, params, data), expected, atol=1e-4)
    accuracies, density = study.measure(model, [params], data)
    np.testing.assert_array_equal(
        accuracies[:, 0], jax.vmap(side_by_side.accuracy)(expected, data).astype(float)
    )
    assert density == pytest.approx(1.0)
    assert np.abs(logits_of(less, params, data) - expected).max() > 1e-2


@pytest.mark.slow  # Compiles a dozen small models.
def test_it_goes_on_where_it_stopped(tmp_path, capsys):
    arguments = ["--tiny", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    assert study.main(arguments) == 0
    path = tmp_path / "frontier.json"
    content = json.loads(path.read_text())
    cells = content["results"]["cells"]
    assert len(cells) == 3 * len(study.plan(study.Setting.tiny()))
    assert all(0 < c["density"] <= 1 for c in cells)
    assert {c["density"] for c in cells if c["rule"] == "dense"} == {1.0}
    content["results"]["cells"] = [c for c in cells if c["rule"] != "pooled"]
    path.write_text(json.dumps(content))
    capsys.readouterr()
    assert study.main(arguments) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if ": density" in line]
    assert [line.split()[2] for line in told] == ["pooled"]
    again = json.loads(path.read_text())["results"]["cells"]
    assert sorted(map(str, again)) == sorted(map(str, cells))
    content["results"]["setting"]["steps"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is of another setting"):
        study.main(arguments)


def cell(size, rule, budget, accuracy, spent, density=0.5, length=64):
    return {
        "size": size, "length": length, "rule": rule, "budget": budget, "task": "needle",
        "accuracy": accuracy, "by_seed": [accuracy], "density": density, "flops": spent,
    }  # fmt: skip


def test_the_frontier_is_what_no_other_beats(tmp_path):
    cells = [
        cell(8, "dense", None, 0.5, 1e6), cell(8, "moba", 8, 0.4, 0.8e6),
        cell(16, "dense", None, 0.9, 3e6), cell(16, "moba", 8, 0.7, 0.9e6),
        cell(16, "pooled", 8, 0.6, 2e6), cell(16, "oracle", 8, 0.95, 0.7e6),
        cell(16, "moba", 8, 1.0, 0.1e6, length=32),
    ]  # fmt: skip
    found = [(c["size"], c["rule"]) for c in report.frontier(cells, 64)]
    assert found == [(8, "moba"), (16, "moba"), (16, "dense")]
    path = tmp_path / "frontier.json"
    path.write_text(json.dumps({"results": {"cells": cells}}))
    assert report.main(["--results", str(path)]) == 0
    assert "| moba, 8   | 50%     | 0.40 (0.40) | 0.70" in (tmp_path / "frontier.md").read_text()
    for name in ("density", "isoflop"):
        assert (tmp_path / f"frontier_{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert report.main(["--results", str(tmp_path / "none.json")]) == 1
