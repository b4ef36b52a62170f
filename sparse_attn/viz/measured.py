"""Times of the kernels as `experiments/kernels` measured them: rows that match a pattern."""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from sparse_attn.patterns import base

RESULTS = pathlib.Path(__file__).parents[2] / "experiments/kernels/results"
PASSES = ("forward", "forward + backward")

# What the rows of each experiment share and do not say: the constants at the top of its script.
_CPU = {"heads": 4, "kv_heads": 4, "head_dim": 64}
_GPU = {"tokens": 16384, "heads": 16, "kv_heads": 16, "head_dim": 128}
_TPU = {"tokens": 16384, "heads": 8, "kv_heads": 2, "head_dim": 128}
_BLOCK = 128  # of the masks in all of them
DENSE = {"causal": 0.5, "full": 1.0}  # Dense masks, and their density.


@dataclasses.dataclass(frozen=True)
class Row:
    """One mask on one device.

    Attributes:
      source: name of the results file.
      device: as in `costs.DEVICES`.
      parts: expressions whose union is the mask; None where the name of the row does not tell.
      tokens, heads, kv_heads, head_dim, block: sizes.
      passes: one of `PASSES`.
      unit: of the times: "ms", or "Mcycles" in the compiler's schedule.
      ours: time of this package's kernel.
      dense: time of the fastest other implementation; None where there is none.
      random_density: block density of a mask of random blocks; None for other masks.
    """

    source: str
    device: str
    parts: frozenset[str] | None
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    block: int
    passes: str
    unit: str
    ours: float
    dense: float | None
    random_density: float | None


def rows(folder: str | os.PathLike[str] = RESULTS) -> list[Row]:
    """All rows of the results files in `folder` that have a time; none when there is no folder."""
    found = []
    for path in sorted(pathlib.Path(folder).glob("*.json")):
        try:
            content = json.loads(path.read_text())
            results = [r for r in content["results"] if isinstance(r, dict)]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # Not a results file, or half written.
        device = str(content.get("environment", {}).get("device", ""))
        for reader in (_cpu_rows, _gpu_rows, _tpu_rows):
            found += reader(path.name, device, results)
    return found


def match(
    pattern: base.Pattern,
    *,
    device: str,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    passes: str,
    dense: str = "causal",
    folder: str | os.PathLike[str] = RESULTS,
) -> tuple[Row, float | None] | None:
    """The row of this mask and these sizes, and its speed-up over dense attention.

    Where several kernels were measured, the row is that of the fastest. The speed-up is the time
    of the fastest implementation on the `dense` mask in the same file, this package's included,
    over the time of this package on this mask. None: no such row.

    >>> found = match(base.parse("local(window=512)"), device="cpu", tokens=8192, heads=4,
    ...               kv_heads=4, head_dim=64, passes="forward")
    >>> found[0].source
    'cpu.json'
    """
    sizes = (device, tokens, heads, kv_heads, head_dim, passes)
    same = [
        r
        for r in rows(folder)
        if (r.device, r.tokens, r.heads, r.kv_heads, r.head_dim, r.passes) == sizes
    ]
    wanted = frozenset(p.expression() for p in _union(pattern))
    row = min((r for r in same if r.parts == wanted), key=lambda r: r.ours, default=None)
    if row is None:
        return None
    fastest = _fastest(same, row.source, dense)
    return row, None if fastest is None else fastest / row.ours


def break_even(
    device: str,
    tokens: int,
    passes: str,
    *,
    dense: str = "causal",
    folder: str | os.PathLike[str] = RESULTS,
) -> dict[int, tuple[float, str]]:
    """By block size: the block density at which sparse costs what dense costs, and the source.

    A line through the times of random blocks at several densities, against the fastest
    implementation on the `dense` mask, at the measured length nearest to `tokens`. At most the
    density of that mask itself. Where several kernels were measured, the highest of theirs.

    >>> all(0 < density <= 0.5 for density, _ in break_even("cpu", 8192, "forward").values())
    True
    """
    mine = [r for r in rows(folder) if (r.device, r.passes) == (device, passes)]
    found = {}
    for source, block in sorted({(r.source, r.block) for r in mine if r.random_density}):
        group = [r for r in mine if (r.source, r.block) == (source, block)]
        lengths = {r.tokens for r in group if r.random_density}
        nearest = min(lengths, key=lambda n: abs(np.log(n / tokens)))
        group = [r for r in group if r.tokens == nearest]
        points = {r.random_density: r.ours for r in group if r.random_density}
        fastest = _fastest(group, source, dense)
        if len(points) < 2 or fastest is None:
            continue
        slope, start = np.polyfit(list(points), list(points.values()), 1)
        if slope > 0 and fastest > start:
            at = min(DENSE[dense], (fastest - start) / slope)
            result = (float(at), f"{source}, {len(points)} densities at {nearest} tokens")
            found[block] = max(result, found.get(block, result))
    return found


def _fastest(candidates: list[Row], source: str, dense: str) -> float | None:
    rows_ = (r for r in candidates if r.parts == {f"{dense}()"} and r.source == source)
    times = [t for r in rows_ for t in (r.ours, r.dense) if t is not None]
    return min(times, default=None)


def _union(pattern) -> Iterator[base.Pattern]:
    if isinstance(pattern, base.Or):
        yield from _union(pattern.a)
        yield from _union(pattern.b)
    else:
        yield pattern


def _parts(name: str) -> frozenset[str] | None:
    """The mask that the experiments call so.

    >>> sorted(_parts("window 512 + 64 sinks"))
    ['local(window=512)', 'sinks(tokens=64)']
    """
    found = set()
    for part in name.split(" + "):
        match re.split(r" (?=\d)|(?<=\d) ", part):
            case ["causal" | "full"]:
                found.add(f"{part}()")
            case ["window", tokens] if tokens.isdigit():
                found.add(f"local(window={tokens})")
            case ["sinks", tokens] | [tokens, "sinks"] if tokens.isdigit():
                found.add(f"sinks(tokens={tokens})")
            case _:
                return None
    return frozenset(found)


def _cpu_rows(source, device, results) -> Iterator[Row]:
    for r in results:
        if "xla ms" not in r or r.get("batch") != 1 or r["pass"] not in PASSES:
            continue
        random = r["mask"].startswith("random") and "run-time" not in r["mask"]
        yield Row(
            source, "cpu", _parts(r["mask"]), r["tokens"], **_CPU, block=_BLOCK, passes=r["pass"],
            unit="ms", ours=r["xla ms"], dense=min(r["reference ms"], r["jax.nn ms"]),
            random_density=r["block density"] if random else None,
        )  # fmt: skip


def _gpu_rows(source, device, results) -> Iterator[Row]:
    name = re.search(r"\b[A-Z]{1,2}\d+\b", device)  # of "NVIDIA A100-SXM4-80GB"
    for r in results:
        if name is None or "workload" not in r or "fwd_ms" not in r:
            continue
        density = r.get("density") if r["workload"].startswith("random") else None
        others = ("cudnn", "mosaic", "flex")
        forward = [r[f"{o}_fwd_ms"] for o in others if r.get(f"{o}_fwd_ms")]
        both = [
            r[f"{o}_fwd_ms"] + r[f"{o}_bwd_ms"]
            for o in others
            if r.get(f"{o}_fwd_ms") and r.get(f"{o}_bwd_ms")
        ]
        for passes, ours, dense in (
            (PASSES[0], r["fwd_ms"], forward),
            (PASSES[1], r["fwd_ms"] + r.get("bwd_ms", np.nan), both),
        ):
            if ours == ours:  # Workloads of another size have it in their name: no part matches.
                yield Row(
                    source, name[0].lower(), _parts(r["workload"]), **_GPU, block=_BLOCK,
                    passes=passes, unit="ms", ours=ours, dense=min(dense, default=None),
                    random_density=density,
                )  # fmt: skip


def _tpu_rows(source, device, results) -> Iterator[Row]:
    by_pass: dict[tuple, dict[str, Any]] = {}
    for r in results:
        if "chip" in r and "cycles" in r.get("ours", {}):
            by_pass.setdefault((r["chip"], r["workload"]), {})[r["pass"]] = r
    for (chip, name), passes in by_pass.items():
        if "forward" not in passes:
            continue
        causal = by_pass.get((chip, "causal"), {}).get("forward")
        density = None
        if name.startswith("random") and causal is not None:
            # The least work of the matrix units counts the visible pairs; causal ones are half.
            density = passes["forward"]["mxu_bound_cycles"] / causal["mxu_bound_cycles"] / 2
        for which, parts in zip(PASSES, (("forward",), ("forward", "backward")), strict=True):
            if all(part in passes for part in parts):
                yield Row(
                    source, chip, _parts(name), **_TPU, block=_BLOCK, passes=which, unit="Mcycles",
                    ours=sum(passes[p]["ours"]["cycles"] for p in parts) / 1e6,
                    dense=sum(passes[p]["splash"]["cycles"] for p in parts) / 1e6,
                    random_density=density,
                )  # fmt: skip
