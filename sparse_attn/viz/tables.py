"""Tables of runs, read from the files in their run folders and nothing else."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from sparse_attn.train import metrics as metrics_lib

TRAIN_LOSS = "train/loss"
VAL_BPB = "eval/bits_per_byte"
ACCURACY = "eval/accuracy"  # of classes
TOKENS_PER_S = "perf/tokens_per_s"

RESULT_COLUMNS = (
    *("pattern", "token density", "block density", "val bits/byte or accuracy", "tokens/s"),
    *("attention GFLOPs/step useful", "executed"),
)
RESULT_NOTE = (
    "Token density: visible pairs over all pairs of query and key. Block density: blocks with at "
    "least one visible pair over all blocks. Accuracy: test images or answers that are right. "
    "Useful FLOPs count visible pairs, executed FLOPs whole blocks, forward and backward of all "
    "layers."
)


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is, as text; "-" where it has not written the number yet."""

    step: str
    checkpoint: str
    val_bpb: str  # or the accuracy, with %
    tokens_per_s: str


def read_json(folder: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """A JSON file of a run folder; empty when it is missing or half written."""
    try:
        content = json.loads(pathlib.Path(folder, name).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, in order; none when the run has not written any."""
    try:
        return metrics_lib.read_json_lines(pathlib.Path(folder, "metrics.jsonl"))
    except FileNotFoundError:
        return []


def series(metrics: Iterable[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric; after a resume the later record of a step counts.

    >>> series([{"step": 1, "a": 5.0}, {"step": 2}, {"step": 1, "a": 4.0}], "a")
    ([1], [4.0])
    """
    points = {int(m["step"]): float(m[key]) for m in metrics if m.get(key) is not None}
    return sorted(points), [points[step] for step in sorted(points)]


def progress(folder: str | os.PathLike[str]) -> Progress:
    """Reads how far the run in `folder` is."""
    lines = read_metrics(folder)
    _, bpb = series(lines, VAL_BPB)
    _, accuracy = series(lines, ACCURACY)
    _, speed = series(lines, TOKENS_PER_S)
    steps = [int(line["step"]) for line in lines]
    try:
        names = os.listdir(os.path.join(folder, "checkpoints"))
    except OSError:
        names = []
    saved = [int(name) for name in names if name.isdigit()]
    return Progress(
        step=str(max(steps)) if steps else "-",
        checkpoint=str(max(saved)) if saved else "-",
        val_bpb=_validation(bpb[-1] if bpb else None, accuracy[-1] if accuracy else None),
        tokens_per_s=f"{speed[-1]:,.0f}" if speed else "-",
    )


def result_row(name: str, folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """One finished run as a row under `RESULT_COLUMNS`."""
    summary = read_json(folder, "summary.json")
    return (
        name,
        _cell(summary.get("token_density"), "{:.4f}"),
        _cell(summary.get("block_density"), "{:.4f}"),
        _validation(summary.get("val_bpb"), summary.get("test_accuracy")),
        _cell(summary.get("tokens_per_s"), "{:,.0f}"),
        _cell(summary.get("useful_flops"), "{:.2f}", 1e-9),
        _cell(summary.get("executed_flops"), "{:.2f}", 1e-9),
    )


def text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An aligned table for a terminal: first two kinds of cells as they are, numbers to the right.

    >>> print(text(("run", "loss"), [("a", 1.5), ("bcd", 10.25)]))
    run   loss
    ---  -----
    a      1.5
    bcd  10.25
    """
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    right = [i > 0 and all(_is_number(row[i]) for row in cells[1:]) for i in range(len(columns))]

    def line(row):
        padded = (
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(cells[0]), line(["-" * w for w in widths]), *map(line, cells[1:])])


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The same table for a Markdown file.

    >>> print(markdown(("run", "loss"), [("a|b", 1.5)]))
    | run | loss |
    | --- | --- |
    | a\\|b | 1.5 |
    """
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in lines
    )


def _is_number(cell: str) -> bool:
    return cell == "-" or cell[:1].isdigit() or (cell[:1] == "-" and cell[1:2].isdigit())


def _validation(bpb: float | None, accuracy: float | None) -> str:
    return _cell(accuracy, "{:.1%}") if bpb is None else _cell(bpb, "{:.4f}")


def _cell(value: float | int | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else form.format(value * factor)
