"""The study of selection rules, with a small and untrained model, and the report of GPU times."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.selection import gpu_report, study
from sparse_attn.selection import base, pooled
from sparse_attn.train import checkpoint, tasks

LENGTH, BLOCK = 128, 16
WHOLE = LENGTH // BLOCK
MODEL = {
    "pattern": "causal()", "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "embed_dim": 16, "mlp_dim": 16, "impl": "reference", "block": BLOCK,
}  # fmt: skip


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The study on rows of 128 tokens, with few rules, writing into a folder of its own."""
    few = {"top_k": (1, 2, WHOLE)}
    monkeypatch.setattr(study, "LENGTH", LENGTH)
    monkeypatch.setattr(study, "BLOCK", BLOCK)
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(study, "CAUSAL", {study.ORACLE: ({}, few), "pooled": ({}, few)})
    monkeypatch.setattr(study, "FULL", {study.ORACLE: ({}, few), "bi_former": ({}, few)})
    return tmp_path


def save_run(folder, context):
    """A run folder as training leaves it, with the parameters of the start."""
    config = {"name": "a", "data": {"context": context}, "model": MODEL}
    example = jnp.zeros((1, 16), jnp.int32)
    params = jax.jit(tasks.of(config).model.init)(jax.random.key(0), example)["params"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with checkpoint.Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": params}, data_state=None)
    return folder


@pytest.mark.slow  # Compiles two dozen small programs.
def test_the_study_writes_curves_table_and_picture(small, tmp_path):
    assert study.main(["--run", str(save_run(tmp_path / "run", LENGTH))]) == 0
    content = json.loads((small / "recall.json").read_text())["results"]
    assert content["settings"]["length"] == LENGTH
    curves = {(c["input"], c["rule"]): c["points"] for c in content["curves"]}
    causal = ("needles", "topics in runs", "trained model")
    assert set(curves) == {
        *((i, r) for i in causal for r in (study.BOUND, study.ORACLE, "pooled")),
        *(("topics, shuffled", r) for r in (study.BOUND, study.ORACLE, "bi_former")),
    }
    for (name, rule), points in curves.items():
        # More is seen, more is kept; all of it where the budget is the row.
        for key in ("density", "recall"):
            values = [p[key] for p in points]
            assert values == sorted(values), (name, rule)
            assert values[-1] == pytest.approx(1.0, abs=1e-5)
        assert rule == study.BOUND or 0 < points[0]["density"] < 0.5
    for name in causal:  # As many blocks, better ones.
        pairs = zip(curves[name, study.ORACLE], curves[name, "pooled"], strict=True)
        for best, mine in pairs:
            assert best["density"] == pytest.approx(mine["density"])
            assert best["recall"] >= mine["recall"] - 1e-5
    assert curves["needles", study.ORACLE][0]["recall"] > curves["needles", "pooled"][0]["recall"]
    text = (small / "recall.md").read_text()
    assert text.count("### ") == 4
    assert text.count("| oracle ") == text.count("| best blocks ") == 4
    assert (small / "recall.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow  # Opens a checkpoint.
def test_the_study_refuses_a_run_of_other_rows(small, tmp_path):
    folder = save_run(tmp_path / "run", 64)
    with pytest.raises(ValueError, match=r"must have data\.context=128"):
        study.main(["--run", str(folder)])
    assert not (small / "recall.json").exists()


@pytest.mark.slow  # Compiles a selection.
def test_pairs_are_those_of_the_dense_mask(small):
    q, k = jax.random.normal(jax.random.key(0), (2, 1, LENGTH, 2, 8))
    mask = pooled.Pooled(block_q=BLOCK, block_kv=BLOCK, top_k=2).select(q, k)
    counts = np.asarray(mask.kv_counts).reshape(mask.num_tables, -1)
    lists = np.asarray(mask.kv_indices).reshape(mask.num_tables, counts.shape[1], -1)
    dense = np.zeros((mask.num_tables, LENGTH, LENGTH), bool)
    for table, row in np.ndindex(counts.shape):
        for column in lists[table, row, : counts[table, row]]:
            tile = np.s_[BLOCK * row : BLOCK * (row + 1), BLOCK * column : BLOCK * (column + 1)]
            dense[table][tile] = True
    seen = (dense & np.tri(LENGTH, dtype=bool)).sum() / mask.num_tables
    given = study.Input("", base.CAUSAL, q, k, q, k)
    assert study.pairs(mask) == pytest.approx(seen)
    assert seen < study.dense_pairs(given) == LENGTH * (LENGTH + 1) / 2


def test_a_rule_above_the_bound_is_told(capsys):
    line = [{"density": 0.0, "recall": 0.0}, {"density": 1.0, "recall": 1.0}]
    bound = {"input": "a", "rule": study.BOUND, "points": line}

    def good(rule, recall):
        point = {"density": 0.5, "recall": recall}
        return study.none_is_above_the_bound([bound, {**bound, "rule": rule, "points": [point]}])

    assert study.recall_at(line, 0.25) == 0.25
    assert study.recall_at(line[1:], 0.25) is None
    assert good("pooled", 0.5)
    assert good("moba", 0.6)  # Chooses for single queries: blocks are no bound.
    assert capsys.readouterr().out == ""
    assert not good("pooled", 0.51)
    assert "a, pooled" in capsys.readouterr().out


def row(method, length, **fields):
    """A measured row: every stage of a pass takes 1 ms."""
    names = [f"{n}_{way}_ms" for way, stages in gpu_report.STAGES.items() for n in stages]
    whole = {"fwd_ms": 4.0, "bwd_ms": 3.0, "dense_fwd_ms": 8.0, "dense_bwd_ms": 9.0}
    speed = {"fwd_speed_up": 2.0, "bwd_speed_up": 3.0}
    return {"method": method, "length": length, **dict.fromkeys(names, 1.0), **whole, **speed} | (
        fields
    )


def test_the_gpu_report_has_stages_fla_and_both_passes(tmp_path, capsys):
    rows = [
        row("moba", 8192, plan_fwd_ms=0.25),
        row("nsa", 8192, fla_fwd_ms=7.5, fla_bwd_ms=6.5, fla_attention_fwd_ms=5.5),
        {"method": "nsa", "length": 65536, "error": "out of memory"},
        {"method": "nsa", "length": 131072, "both_ms": 99.0, "both_temp_bytes": 21e9},
    ]
    path = tmp_path / "times.json"
    environment = {"device": "a GPU", "commit": "abc"}
    path.write_text(json.dumps({"environment": environment, "results": rows}))
    assert gpu_report.main(["--results", str(path)]) == 0
    text = path.with_suffix(".md").read_text()
    assert capsys.readouterr().out == text
    assert text.startswith("a GPU, commit abc")
    titles = ("Forward", "Backward", "All stages in one program")
    forward, backward, both = (cells_after(text, title) for title in titles)
    assert [(r["method"], r["tokens"]) for r in forward] == [
        ("moba", "8192"), ("nsa", "8192"), ("nsa", "65536"),
    ]  # fmt: skip
    moba, nsa, failed = forward
    assert moba["of it plan"] == "0.25"
    assert (moba["all"], moba["dense"], moba["dense / all"], moba["fla all"]) == ("4", "8", "2", "")
    assert (nsa["fla attention"], nsa["fla all"]) == ("5.5", "7.5")
    assert failed["all"] == ""
    assert backward[1]["fla all"] == "6.5"
    assert "scoring and selection" not in backward[0]
    assert both == [
        {
            "method": "nsa", "tokens": "131072", "both passes": "99",
            "GB besides inputs and gradients": "21",
        }
    ]  # fmt: skip
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def cells_after(text, title):
    """The rows of the table behind a title, as dicts of texts."""
    lines = text[text.index(title) :].split("\n\n")[1].splitlines()
    header, _, *body = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return [dict(zip(header, line, strict=True)) for line in body]


def test_the_gpu_report_of_errors_alone_has_no_picture(tmp_path):
    gpu_report.plot([{"method": "nsa", "length": 8192, "error": "no"}], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
