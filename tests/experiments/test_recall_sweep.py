"""The report of a recall sweep, from run folders whose numbers are known."""

import json

import pytest

from configs import recall
from experiments.recall import sweep_report

ACCURACY = {"full": 0.9, "window8": 0.2}


@pytest.fixture
def workdir(tmp_path):
    points = [p for p in recall.sweep_methods() if p["data.task"] == recall.TASKS["mqar"]]
    count = 0
    for point in points:
        method = point["name"].partition(",")[0]
        if method not in ACCURACY:
            continue
        folder = tmp_path / f"{count:03d}"
        folder.mkdir()
        count += 1
        # The second rate is the best; seeds differ by a hundredth.
        right = ACCURACY[method] - 10 * abs(point["optim.lr"] - 1e-2) + 0.01 * point["seed"]
        dense = method == "full"
        summary = {
            "finished": True, "name": point["name"], "pattern": point["model.pattern"],
            "params": 1000, "steps": 100, "tokens": 100 * 64 * 48, "row_tokens": 48,
            "token_density": 0.5 if dense else 0.125, "useful_flops": 8e6 if dense else 2e6,
            "test_accuracy": right, "chance": 1 / 128,
        }  # fmt: skip
        config = {
            "seed": point["seed"], "optim": {"lr": point["optim.lr"]},
            "model": {"num_layers": 2, "num_kv_heads": 3, "head_dim": 10},
        }  # fmt: skip
        lines = [{"step": s, "eval/accuracy": right * s / 100} for s in (50, 100)]
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / "summary.json").write_text(json.dumps(summary | {"finished": False}))
    return tmp_path


def test_cells_are_the_seeds_at_the_best_rate(workdir):
    runs = sweep_report.read(workdir)
    assert len(runs) == 2 * 9 - 1  # One is not finished.
    full, window = sweep_report.cells(runs)
    assert (full["method"], full["lr"], full["seeds"], full["rates"]) == ("full", 1e-2, 3, 3)
    assert full["mean"] == pytest.approx(0.91)
    assert (full["low"], full["high"]) == pytest.approx((0.9, 0.92))
    # 24 and 6 visible keys, each of 2 (key, value) x 2 layers x 3 heads x 10 numbers of 4 bytes.
    assert (full["kv_bytes"], window["kv_bytes"]) == (24 * 480, 6 * 480)
    assert full["flops"] == 100 * (6 * 1000 * 64 * 48 + 8e6)


def test_equal_flops_stop_at_what_the_cheapest_spent(workdir):
    full, window = sweep_report.cells(sweep_report.read(workdir))
    assert window["flops"] < full["flops"]
    step = full["flops"] / 100
    assert sweep_report.at_flops(full, 75 * step) == pytest.approx(0.91 * 0.75, abs=1e-4)
    assert sweep_report.at_flops(full, 0.0) == pytest.approx(1 / 128, abs=1e-4)
    last = sweep_report.iso_table([full, window]).splitlines()[-1]
    expected = sweep_report.at_flops(full, window["flops"])
    assert [x.strip() for x in last.split("|")[2:5]] == [
        f"{window['flops'] / 1e9:.1f}", f"{expected:.2f}", "0.21",
    ]  # fmt: skip


def test_it_writes_tables_pictures_and_json(workdir, tmp_path_factory, capsys):
    out = tmp_path_factory.mktemp("out")
    assert sweep_report.main([str(workdir), "--out", str(out)]) == 0
    assert "0.91 (0.90 to 0.92)" in (out / "sweep.md").read_text()
    assert len(json.loads((out / "sweep.json").read_text())["results"]["cells"]) == 2
    for name in ("density", "kv", "isoflop"):
        assert (out / f"sweep_{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert sweep_report.main([str(out)]) == 1
    assert "no finished run" in capsys.readouterr().out
