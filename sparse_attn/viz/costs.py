"""What a pattern costs on a device: FLOPs, bytes, balance, and how much faster than dense."""

import dataclasses
import os
from typing import Any

import numpy as np

from sparse_attn.masks import lower, stats
from sparse_attn.ops import tiles
from sparse_attn.patterns import base, per_head
from sparse_attn.viz import measured, tables

_MAX_PAIRS = 1 << 30  # Counted in PARTIAL blocks at most: about 1 s.
_BLOCKS = (16, 32, 64, 128, 256)  # Sizes that a break-even density is given for.
_ITEMSIZE = 2  # bfloat16


@dataclasses.dataclass(frozen=True)
class Device:
    """The numbers of a data sheet that a bound needs, for dense bfloat16; None = not known.

    Attributes:
      name: as in `DEVICES`.
      flops: peak of the matrix units, per second.
      bytes_per_s: of the main memory.
      cores: units that work on blocks of queries independently.
      tile: tokens per side of the smallest product that fills the matrix unit.
    """

    name: str
    flops: float | None
    bytes_per_s: float | None
    cores: int
    tile: int


DEVICES = {
    device.name: device
    for device in (
        Device("cpu", None, None, 1, 1),
        Device("a100", 312e12, 2.04e12, 108, 64),
        Device("h100", 989e12, 3.35e12, 132, 64),
        Device("h200", 989e12, 4.8e12, 132, 64),
        Device("b200", 2250e12, 8.0e12, 148, 128),
        Device("v4", 275e12, 1.23e12, 2, 128),
        Device("v5e", 197e12, 0.82e12, 1, 128),
        Device("v5p", 459e12, 2.77e12, 2, 128),
        Device("v6e", 918e12, 1.64e12, 1, 256),
    )
}


@dataclasses.dataclass(frozen=True)
class BreakEven:
    """Block density above which blocks of `block` tokens are slower than dense attention."""

    block: int
    block_density: float
    source: str


@dataclasses.dataclass(frozen=True)
class Cost:
    """What `cost` found, for one sequence and all heads.

    Attributes:
      pattern: its expression.
      length, kv_length, head_dim, heads, kv_heads, block: sizes in tokens and heads.
      device, passes: as given.
      dense: what it is compared with: "causal" for causal patterns, "full" for others.
      token_density, block_density: see `stats.MaskStats`; token_density and useful_flops are None
        where counting would take long.
      useful_flops, executed_flops: of visible pairs, of whole active blocks.
      least_bytes: every array once, K and V only where a query needs them.
      kv_bytes: K and V as a kernel without any cache would read them, block by block, forward.
      imbalance: most active blocks in a row of blocks / mean.
      bound: upper bound of the speed-up over dense attention by this model: the longest of
        FLOPs / peak, bytes / bandwidth and the longest row of blocks on one core, for both.
      limited_by: which of the three holds the pattern back.
      measured: row of a results file with this mask and these sizes, or None.
      measured_speedup: of that row over the fastest dense attention in its file, or None.
      break_even: per block size, from results where there are any and else from the model.
    """

    pattern: str
    length: int
    kv_length: int
    head_dim: int
    heads: int
    kv_heads: int
    block: int
    device: str | None
    passes: str
    dense: str
    token_density: float | None
    block_density: float
    useful_flops: float | None
    executed_flops: float
    least_bytes: int
    kv_bytes: float
    imbalance: float
    bound: float
    limited_by: str
    measured: measured.Row | None
    measured_speedup: float | None
    break_even: tuple[BreakEven, ...]

    @property
    def executed_over_useful(self) -> float | None:
        """FLOPs spent per FLOP that counts."""
        return None if not self.useful_flops else self.executed_flops / self.useful_flops

    def __str__(self) -> str:
        """One line per quantity."""
        on = "" if self.device is None else f" on {self.device}"
        useful, ratio = self.useful_flops, self.executed_over_useful
        lines = [
            ("token density", _number(self.token_density, "{:.4g}", "not counted")),
            ("block density", f"{self.block_density:.4g}, blocks of {self.block}"),
            ("useful GFLOPs", _number(useful, "{:.4g}", "not counted", 1e-9)),
            (
                "executed GFLOPs",
                f"{self.executed_flops / 1e9:.4g}" + _number(ratio, " ({:.2f} x useful)", ""),
            ),
            ("least MB", f"{self.least_bytes / 1e6:.4g}"),
            ("K and V MB by blocks", f"{self.kv_bytes / 1e6:.4g}"),
            ("imbalance", f"{self.imbalance:.2f}"),
            (f"speed-up over {self.dense}, bound", f"{self.bound:.2f} ({self.limited_by})"),
            (f"speed-up over {self.dense}, measured", self._measured()),
        ]
        lines += [
            (f"break-even block density, {b.block}", f"{b.block_density:.3f} ({b.source})")
            for b in self.break_even
        ]
        head = (
            f"{self.pattern}\n{self.length} x {self.kv_length} tokens, {self.heads} heads "
            f"({self.kv_heads} KV) of {self.head_dim}, {self.passes}{on}\n"
        )
        width = max(len(name) for name, _ in lines)
        return head + "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines)

    def _measured(self) -> str:
        if self.measured is None:
            return "no matching row"
        row, speedup = self.measured, _number(self.measured_speedup, "{:.2f}, ", "")
        return f"{speedup}{row.ours:.4g} {row.unit} ({row.source})"


COLUMNS = (
    *("pattern", "token density", "block density", "executed / useful", "GFLOPs", "K,V MB"),
    *("imbalance", "bound", "measured"),
)


def row(found: Cost) -> tuple[str, ...]:
    """One cost as a row under `COLUMNS`, for `tables.text` and `tables.markdown`."""
    return (
        found.pattern,
        _number(found.token_density, "{:.4f}"),
        f"{found.block_density:.4f}",
        _number(found.executed_over_useful, "{:.2f}"),
        f"{found.executed_flops / 1e9:.2f}",
        f"{found.kv_bytes / 1e6:.1f}",
        f"{found.imbalance:.2f}",
        f"{found.bound:.2f}",
        _number(found.measured_speedup, "{:.2f}"),
    )


def cost(
    pattern: base.Pattern | per_head.PerHead | str,
    length: int,
    head_dim: int,
    heads: int,
    device: str | None = None,
    *,
    kv_length: int | None = None,
    kv_heads: int | None = None,
    block: int | None = None,
    passes: str = "forward",
    results: str | os.PathLike[str] = measured.RESULTS,
) -> Cost:
    """What attention with `pattern` costs, and the most it can gain over dense attention.

    FLOPs and blocks are counted exactly. The speed-up is a bound: a kernel that reaches the peak
    and wastes nothing but masked pairs gets it. Its model is a roofline, for the pattern and for
    the dense mask (causal if the pattern is, else full) at the same blocks alike. Where results
    files have a row of the same mask, sizes and device, what was measured stands beside it.

    The break-even density of a block size without results is that of a roofline in which every
    active block reads its K and V from memory and a small block fills a tile of the matrix unit
    only in part: min(1, block * group * bandwidth / peak, (block / tile) ** 2) of the density of
    the dense mask, with `group` query heads per KV head.

    Args:
      pattern: a `Pattern`, a `PerHead`, or an expression; of a schedule one layer at a time.
      length, kv_length: tokens of queries and keys; default: the same.
      head_dim, heads, kv_heads: H, N and K (default N).
      device: a name in `DEVICES`, or None for a bound by FLOPs alone.
      block: tokens per block; default as in `attend`.
      passes: "forward" or "forward + backward".
      results: folder with results files.

    Raises:
      ValueError: an argument is not in its range.

    >>> found = cost("local(window=1024)", 16384, head_dim=128, heads=16, device="h200")
    >>> round(found.executed_over_useful, 2), round(found.bound, 2), found.limited_by
    (1.12, 7.4, 'FLOPs')
    """
    pattern = base.parse(pattern) if isinstance(pattern, str) else pattern
    if not isinstance(pattern, (base.Pattern, per_head.PerHead)):
        raise ValueError(
            f"pattern={pattern!r} must be a Pattern or a PerHead; of a schedule one layer at a "
            "time, pattern.for_layer(i)"
        )
    kv_heads = heads if kv_heads is None else kv_heads
    for name, size in (("length", length), ("head_dim", head_dim), ("heads", heads)):
        base.check_int(name, size)
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads={kv_heads} must divide heads={heads}")
    if device is not None and device not in DEVICES:
        raise ValueError(f"device={device!r} must be None or one of {', '.join(DEVICES)}")
    base.check_choice("passes", passes, measured.PASSES)
    target = DEVICES["cpu" if device is None else device]
    kv_length = length if kv_length is None else kv_length
    block = tiles.mask_block(length) if block is None else block
    per_heads = pattern.for_heads(heads) if isinstance(pattern, per_head.PerHead) else pattern
    mask = lower.lower(per_heads, q_len=length, kv_len=kv_length, block_q=block, block_kv=block)
    counted = stats.of(mask, max_pairs=_MAX_PAIRS)
    both = (False, True) if passes == measured.PASSES[1] else (False,)
    sizes = (head_dim, heads)
    useful = None
    if counted.token_density is not None:
        useful = sum(counted.useful_flops(*sizes, backward=b) for b in both)
    executed = sum(counted.executed_flops(*sizes, backward=b) for b in both)
    one = dataclasses.replace(counted, partial_blocks=1.0, full_blocks=0.0)
    per_block = sum(one.executed_flops(head_dim, 1, backward=b) for b in both)
    least = _least_bytes(mask, length, head_dim, heads, kv_heads, len(both))
    times = _times(target, executed, least, int(mask.kv_counts.max()) * per_block)
    dense = "causal" if pattern.causal else "full"
    dense_blocks = np.full(mask.num_rows, mask.num_cols)
    if pattern.causal:
        dense_blocks = np.minimum(np.arange(1, mask.num_rows + 1), mask.num_cols)
    dense_keys = min(length, kv_length) if pattern.causal else kv_length
    dense_times = _times(
        target,
        int(dense_blocks.sum()) * heads * per_block,
        _bytes(length, dense_keys, head_dim, heads, kv_heads, len(both)),
        int(dense_blocks.max()) * per_block,
    )
    limit = max(times, key=times.__getitem__)
    found = None
    if device is not None and isinstance(pattern, base.Pattern) and kv_length == length:
        found = measured.match(
            pattern, device=device, tokens=length, heads=heads, kv_heads=kv_heads,
            head_dim=head_dim, passes=passes, dense=dense, folder=results,
        )  # fmt: skip
    return Cost(
        pattern=pattern.expression(),
        length=length,
        kv_length=kv_length,
        head_dim=head_dim,
        heads=heads,
        kv_heads=kv_heads,
        block=block,
        device=device,
        passes=passes,
        dense=dense,
        token_density=counted.token_density,
        block_density=counted.block_density,
        useful_flops=useful,
        executed_flops=executed,
        least_bytes=least,
        kv_bytes=counted.kv_bytes(head_dim, kv_heads),
        imbalance=counted.imbalance,
        bound=max(dense_times.values()) / times[limit] if times[limit] else float("inf"),
        limited_by=limit,
        measured=None if found is None else found[0],
        measured_speedup=None if found is None else found[1],
        break_even=_break_even(target, device, length, passes, dense, heads // kv_heads, results),
    )


def _times(device, flops, size, longest_row) -> dict[str, float]:
    """Least time by each limit; in units of FLOPs where the device is not known."""
    if device.flops is None:
        return {"FLOPs": flops}
    return {
        "FLOPs": flops / device.flops,
        "bytes": size / device.bytes_per_s,
        "longest row": longest_row / (device.flops / device.cores),
    }


def _least_bytes(mask, length, head_dim, heads, kv_heads, num_passes) -> int:
    """Q and the output once, and the blocks of K and V that some query of some head needs."""
    needed = int((mask.q_counts[0] > 0).any(0).sum()) * mask.block_kv
    return _bytes(length, min(needed, mask.kv_len), head_dim, heads, kv_heads, num_passes)


def _bytes(length, keys, head_dim, heads, kv_heads, num_passes) -> int:
    # Backward reads all four again with the output's gradient, and writes three gradients.
    tokens = heads * length + kv_heads * keys
    return 2 * tokens * head_dim * _ITEMSIZE * (1 if num_passes == 1 else 3)


def _break_even(device, name, tokens, passes, dense, group, results) -> tuple[BreakEven, ...]:
    if name is None:
        return ()
    known = measured.break_even(name, tokens, passes, dense=dense, folder=results)
    found = {b: BreakEven(b, at, source) for b, (at, source) in known.items()}
    if device.flops is not None:
        for block in _BLOCKS:
            fed = block * group * device.bytes_per_s / device.flops
            share = min(1, fed, (block / device.tile) ** 2)
            found.setdefault(block, BreakEven(block, share * measured.DENSE[dense], "model"))
    return tuple(found[block] for block in sorted(found))


def _number(value: Any, form: str, missing: str = "-", factor: float = 1.0) -> str:
    return missing if value is None else form.format(value * factor)


def table(costs: list[Cost]) -> str:
    """Several costs as an aligned table for a terminal.

    >>> print(table([cost("causal()", 256, 64, 1)]).splitlines()[-1][:10])
    causal()
    """
    return tables.text(COLUMNS, [row(found) for found in costs])
