"""The report of a sweep: one Markdown file with the table, loss curves, block maps and samples."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sparse_attn import patterns
from sparse_attn.patterns import per_layer
from sparse_attn.selection import base as selection_base
from sparse_attn.viz import plots, show, tables

_BLOCK = 16  # tokens per pixel of a block map, as long as the context stays small


def write(workdir: str | os.PathLike[str], runs: Sequence[tuple[str, str]]) -> str:
    """Writes `<workdir>/report.md` and its pictures in `<workdir>/report/`; returns its path.

    Args:
      workdir: folder of the sweep.
      runs: (name, run folder) of every finished run, in the order to show them. Only the files in
        the run folders are read: `summary.json`, `metrics.jsonl`, `config.json`, `sample.txt`.
    """
    root = pathlib.Path(workdir)
    (root / "report").mkdir(parents=True, exist_ok=True)
    metrics = {name: tables.read_metrics(folder) for name, folder in runs}
    plots.curves(
        {
            title: {name: tables.series(lines, key) for name, lines in metrics.items()}
            for title, key in (
                ("training loss, nats", tables.TRAIN_LOSS),
                ("validation bits per byte", tables.VAL_BPB),
                ("accuracy on test examples", tables.ACCURACY),
            )
            if any(key in line for lines in metrics.values() for line in lines)
        },
        root / "report" / "loss.png",
    )
    plots.images(
        {
            title: pixels
            for name, folder in runs
            for title, pixels in _block_maps(name, folder).items()
        },
        root / "report" / "patterns.png",
    )
    rows = [tables.result_row(name, folder) for name, folder in runs]
    parts = [
        f"# Runs in `{root}`",
        _corpus(runs),
        tables.markdown(tables.RESULT_COLUMNS, rows),
        tables.RESULT_NOTE,
        "## Loss",
        "![Training loss and validation by step](report/loss.png)",
        "## What a query sees",
        "Queries run from top to bottom, keys from left to right. White: nothing visible in the "
        "block, light: some pairs, dark: all.",
        "![Block maps of the patterns](report/patterns.png)",
        *_samples(runs),
    ]
    path = root / "report.md"
    path.write_text("\n\n".join(filter(None, parts)) + "\n")
    return str(path)


def _corpus(runs: Sequence[tuple[str, str]]) -> str:
    """One line per data set that was trained on; runs of one sweep usually share it."""
    texts: dict[str, list[str]] = {}
    for name, folder in runs:
        corpus = tables.read_json(folder, "corpus.json")
        if corpus:
            size = f", {corpus['num_bytes']:,} bytes" if "num_bytes" in corpus else ""
            found = f"{corpus['name']}{size}, sha256 {corpus['sha256']}"
            texts.setdefault(found, []).append(name)
    return "\n\n".join(
        f"Data: {found}." if len(texts) == 1 else f"Data of {', '.join(names)}: {found}."
        for found, names in texts.items()
    )


def _block_maps(name: str, folder: str) -> dict[str, UInt8[np.ndarray, "height width 3"]]:
    config = tables.read_json(folder, "config.json")
    expressions, context = config["model"]["pattern"], _row_tokens(config, folder)
    if isinstance(expressions, str):
        parsed = patterns.parse(expressions)
        layers = parsed.patterns if isinstance(parsed, per_layer.PerLayer) else (parsed,)
    else:
        layers = tuple(patterns.parse(expression) for expression in expressions)
    block = max(1, min(_BLOCK, context // 8))
    maps = {}
    for i, layer in enumerate(layers):
        title = name if len(layers) == 1 else f"{name}, layer {i}"
        if isinstance(layer, selection_base.Selector):
            title, layer = f"{title} (chooses from)", layer.pattern
        maps[title] = show.image(layer, context, block)
    return maps


def _row_tokens(config: dict[str, Any], folder: str) -> int:
    """Tokens per row: of images the summary knows them."""
    return config["data"].get("context") or tables.read_json(folder, "summary.json")["row_tokens"]


def _samples(runs: Sequence[tuple[str, str]]) -> list[str]:
    samples = [sample for name, folder in runs if (sample := _sample(name, folder))]
    return ["## Samples", *samples] if samples else []


def _sample(name: str, folder: str) -> str:
    try:
        sample = pathlib.Path(folder, "sample.txt").read_text(errors="replace")
    except OSError:
        return ""
    # Indented, not fenced: whatever the model wrote cannot end the block.
    lines = ["".join(c if c.isprintable() else "·" for c in line) for line in sample.split("\n")]
    return f"**{name}**\n\n" + "\n".join(f"    {line}" for line in lines)
