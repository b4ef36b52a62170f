"""Static cost of the TPU kernels beside JAX's splash attention, from the compiler's own schedule.

    python -m experiments.kernels.tpu_cost --generations v5e --workloads causal window

No TPU is needed: libtpu compiles ahead of time and writes the VLIW bundles of each kernel. A kernel
is cut into the body of a step (by state of the tile), what opens and closes an output row, and the
rest of a step; cycles = bundles x how often each runs, and a body takes no less than its products
take the matrix units. Waiting for memory is not in it: HBM bytes stand beside.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks

from experiments.kernels import bench, tpu_schedule
from sparse_attn.masks import block_mask, lower, segments, stats
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import tiles
from sparse_attn.ops.block_sparse import inputs as inputs_lib
from sparse_attn.ops.block_sparse import tpu_launch, tpu_steps
from sparse_attn.patterns import base, causal, full, local, sinks

LENGTH, HEAD_DIM, HEADS, KV_HEADS, BATCH = 16384, 128, 8, 2, 8
SPLASH_BLOCKS = ((512, 1024, 512), (1024, 1024, 512), (512, 512, 512), (128, 128, 128))
RESULTS = pathlib.Path(__file__).parent / "results"


# --- Workloads ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Workload:
    """A mask as ours takes it, as splash takes it, and its tokens' worth.

    Attributes:
      mask: what `attend` takes.
      splash: patterns by head for the blocks that splash visits.
      variant: how splash masks: "function", "segments" or "array".
      segment_ids: packed documents, or None.
    """

    mask: Any
    splash: tuple
    variant: str = "function"
    segment_ids: Any = None


@dataclasses.dataclass(frozen=True)
class RandomBlocks:
    """States of 128-blocks for splash; stands where a pattern does."""

    density: float

    def states(self):
        blocks = LENGTH // 128
        keep = np.random.default_rng(0).random((blocks, blocks)) < self.density
        np.fill_diagonal(keep, True)
        return np.where(keep, 2, 0)


def workloads() -> dict[str, Workload]:
    """The rows of the table."""
    window = local.Local(window=1024)
    stream = window | sinks.Sinks(tokens=64)
    result = {
        "causal": Workload(causal.Causal(), (causal.Causal(),)),
        "window 1024": Workload(window, (window,)),
        "window 1024 + sinks": Workload(stream, (stream,)),
    }
    lengths = np.random.default_rng(0).multinomial(LENGTH, np.ones(16) / 16)
    ids = np.repeat(np.arange(1, 17), lengths)[None].astype(np.int32)
    result["documents (16)"] = Workload(causal.Causal(), (causal.Causal(),), "segments", ids)
    windows = tuple(local.Local(window=w) for w in (256, 256, 256, 256, 512, 512, 512, 512))
    mixed = (*windows[:4], *(causal.Causal(),) * 4)
    result["heads differ"] = Workload(mixed, mixed)
    for density in (0.1, 0.3, 0.6):
        random = RandomBlocks(density)
        sizes = {"q_len": LENGTH, "kv_len": LENGTH, "block_q": 128, "block_kv": 128}
        mask = block_mask.from_block_states(random.states(), rule=full.Full(), **sizes)
        result[f"random {density:.0%}"] = Workload(mask, (random,), "array")
    return result


# --- Ours -----------------------------------------------------------------------------------------


def shapes(length: int, *, splash: bool, batch: int = BATCH):
    """q, k, v: at the default batch large enough that the compiler leaves them in HBM."""
    q, k = (
        (batch, n, length, HEAD_DIM) if splash else (batch, length, n, HEAD_DIM)
        for n in (HEADS, KV_HEADS)
    )
    return tuple(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in (q, k, k))


def gradient(f):
    return jax.grad(lambda *a: f(*a).astype(jnp.float32).sum(), argnums=(0, 1, 2))


def ours(generation: str, work: Workload, dump: str) -> dict[str, Any]:
    """Cycles and bytes of one batch entry, forward and backward."""
    args = shapes(LENGTH, splash=False)
    ids = work.segment_ids
    if ids is not None:
        args = (*args, jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32))

    def f(q, k, v, ids=None):
        return attend_lib.attend(q, k, v, mask=work.mask, segment_ids=ids, impl="pallas_tpu")

    kernels = tpu_schedule.compile_kernels(generation, gradient(f), args, dump)
    mask = work.mask
    if not isinstance(mask, block_mask.BlockMask):
        mask = lower.lower(mask, q_len=LENGTH)
    if ids is not None:
        mask = segments.restrict(mask, jnp.asarray(ids), jnp.asarray(ids))
    one = [jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for x in args[:3]]
    inputs = inputs_lib.Inputs(*one, mask, *(None,) * 6, HEAD_DIM**-0.5, None)
    target = tiles.Target("tpu", tpu_schedule.device(generation).device_kind)
    result = {}
    for pass_ in ("forward", "backward"):
        kernel = next(k for n, k in kernels.items() if f"block_sparse_{pass_}" in n)
        with tiles.assume(target):
            call = tpu_launch.plan(inputs, pass_)
        flags = np.concatenate(
            [np.asarray(x)[:n] for x, n in zip(call.steps.inner, call.steps.totals, strict=True)]
        )
        state = flags & tpu_steps.STATE
        counts = [int((state == s).sum()) * call.repeats for s in (2, 1)]
        steps = len(flags) * call.repeats
        rows = int((flags & tpu_steps.FIRST != 0).sum()) * call.repeats
        cycles = steps * kernel.rest + rows * (kernel.first + kernel.last)
        cycles += sum(n * c for n, c in zip(counts, kernel.bodies, strict=True))
        # One array of the tile in bfloat16; what is summed in HBM is read and written in float32.
        keys = call.parts * call.tile_kv * HEAD_DIM * 2
        queries = call.tile_q * call.group * HEAD_DIM * 2
        per_step, per_row = {
            ("forward", "rows"): (2 * keys, 2 * queries),
            ("backward", "rows"): (2 * keys + 8 * keys, 3 * queries),
            ("backward", "cols"): (2 * queries + 4 * queries, 4 * keys),
        }[pass_, call.by]
        moved = steps * per_step + rows * per_row
        result[pass_] = {
            "cycles": cycles, "steps": steps, "full": counts[0], "partial": counts[1],
            "by": call.by, "tile": [call.tile_q, call.tile_kv], "parts": call.parts,
            "hbm_bytes": moved,
            "kernel": dataclasses.asdict(kernel),
        }  # fmt: skip
    return result


# --- Splash ---------------------------------------------------------------------------------------


def splash_kernel(patterns: tuple, blocks: tuple, *, length: int = LENGTH):
    """Splash for patterns by head (Causal and Local; None = a random array).

    Its backward is one kernel of five products; the other choice, two kernels of seven, has more
    of everything that is counted here.
    """
    block_q, block_kv, compute = blocks
    sizes = splash_lib.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=compute,
        block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )  # fmt: skip

    def mask(pattern):
        if pattern is None:
            return splash_masks.NumpyMask(np.random.default_rng(0).random((length, length)) < 0.5)
        if isinstance(pattern, local.Local):
            sides = (pattern.window - 1, 0) if pattern.reach is None else pattern.reach
            return splash_masks.LocalMask((length, length), sides, 0)
        if isinstance(pattern, base.Or):
            return mask(pattern.a) | mask(pattern.b)
        if isinstance(pattern, sinks.Sinks):
            at = np.arange(length)
            return splash_masks.NumpyMask(np.asarray(pattern.mask_fn(at[:, None], at[None])))
        return splash_masks.CausalMask((length, length))

    masks = [mask(p) for p in patterns] * (HEADS // len(patterns))
    return splash_lib.make_splash_mha(
        splash_masks.MultiHeadMask(masks), block_sizes=sizes, head_shards=1, q_seq_shards=1
    )


def call_splash(kernel, q, k, v, ids=None):
    if ids is None:
        return jax.vmap(kernel)(q, k, v)
    return jax.vmap(kernel)(q, k, v, splash_lib.SegmentIds(ids, ids))


@functools.cache
def splash_bundles(generation: str, variant: str, blocks: tuple, dump: str):
    """Splash's kernels for one way of masking; bundles per step do not depend on the length."""
    length = LENGTH // 4
    pattern = None if variant == "array" else causal.Causal()
    kernel = splash_kernel((pattern,), blocks, length=length)
    args = shapes(length, splash=True, batch=4 * BATCH)  # As many bytes as at full length.
    if variant == "segments":
        args = (*args, jax.ShapeDtypeStruct((4 * BATCH, length), jnp.int32))

    def f(q, k, v, ids=None):
        return call_splash(kernel, q, k, v, ids)

    return tpu_schedule.compile_kernels(generation, gradient(f), args, dump)


def splash_blocks(patterns: tuple, block_q: int, block_kv: int) -> np.ndarray:
    """Blocks that splash computes, bool `[heads, nq, nk]`."""
    grids = []
    for pattern in patterns:
        if isinstance(pattern, RandomBlocks):
            states = pattern.states()
            r, c = block_q // 128, block_kv // 128
            grid = states.reshape(len(states) // r, r, -1, c).any((1, 3))
        else:
            mask = lower.lower(pattern, q_len=LENGTH, block_q=block_q, block_kv=block_kv)
            grid = block_mask.block_states(mask) > 0
        grids.append(grid)
    return np.stack(grids * (HEADS // len(grids)))


def splash(generation: str, work: Workload, dump: str) -> dict[str, Any]:
    """Its best cycles over block sizes."""
    best: dict[str, Any] = {}
    for blocks in SPLASH_BLOCKS:
        active = splash_blocks(work.splash, *blocks[:2])
        heads, rows, cols = active.shape
        # The grid shrinks to the longest row (column) of all heads.
        by_rows = (active, heads * rows * active.sum(2).max(), heads * rows)
        by_cols = (active, heads * cols * active.sum(1).max(), KV_HEADS * cols)
        try:
            kernels = splash_bundles(generation, work.variant, blocks, dump)
        except Exception as error:  # A size that does not fit is no candidate.
            print(f"  splash {blocks}: {str(error).splitlines()[0][:120]}")
            continue
        for pass_, name, (grid, steps, edges) in (
            ("forward", "fwd", by_rows), ("backward", "dkv", by_cols),
        ):  # fmt: skip
            kernel = next(k for n, k in kernels.items() if name in n)
            cycles = int(
                steps * kernel.rest
                + grid.sum() * sum(kernel.bodies)
                + edges * (kernel.first + kernel.last)
            )
            if cycles < best.get(pass_, {"cycles": np.inf})["cycles"]:
                best[pass_] = {
                    "cycles": cycles, "blocks": blocks, "active_blocks": int(active.sum()),
                    "kernel": dataclasses.asdict(kernel),
                }  # fmt: skip
    return best


def mxu_cycles(generation: str, work: Workload, pass_: str) -> int:
    """Cycles of the products of the visible pairs alone: 2 forward, 5 backward."""
    mask = work.mask
    if not isinstance(mask, block_mask.BlockMask):
        mask = lower.lower(mask, q_len=LENGTH)
    density = stats.of(mask).token_density
    if work.segment_ids is not None:
        counts = np.bincount(work.segment_ids[0])
        density = (counts * (counts + 1) / 2).sum() / LENGTH**2
    units, cycles = tpu_schedule.MXU[generation]
    products = 2 if pass_ == "forward" else 5
    # A `vmatmul` is 16 rows against 128 x 128 numbers, 128 x 256 in halves on v6e.
    lanes = 256 if generation == "v6e" else 128
    per_product = 16 * HEAD_DIM * lanes * units / cycles
    return int(products * HEADS * density * LENGTH**2 * HEAD_DIM / per_product)


def row(record: dict[str, Any]) -> dict[str, Any]:
    """A record as a row of the table."""
    ours, theirs = record["ours"], record["splash"]
    return {
        **{key: record[key] for key in ("chip", "workload", "pass")},
        "ours (Mcycles)": ours["cycles"] / 1e6, "tile": "x".join(map(str, ours["tile"])),
        "tiles per step": ours["parts"], "splash": theirs["cycles"] / 1e6,
        "blocks": "x".join(map(str, theirs["blocks"][:2])),
        "splash / ours": theirs["cycles"] / ours["cycles"],
        "MXU bound": record["mxu_bound_cycles"] / 1e6,
        "splash / bound": theirs["cycles"] / record["mxu_bound_cycles"],
        "HBM MB": ours["hbm_bytes"] / 1e6,
    }  # fmt: skip


def main() -> None:
    """Writes tpu_cost_<chip>.json, and tpu_cost.md from the records of all chips beside it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--generations",
        nargs="*",
        default=list(tpu_schedule.GENERATIONS),
        choices=tpu_schedule.GENERATIONS,
        help="default all; none = only the table, from the records there are",
    )
    parser.add_argument("--workloads", nargs="+", help="first words of their names; default all")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="a folder")
    options = parser.parse_args()
    chosen = {
        name: work for name, work in workloads().items()
        if options.workloads is None or any(name.startswith(w) for w in options.workloads)
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as dump:
        tpu_schedule.start(dump)
        for generation in options.generations:
            records = []
            for name, work in chosen.items():
                mine, theirs = ours(generation, work, dump), splash(generation, work, dump)
                for pass_ in ("forward", "backward"):
                    records.append(
                        {"chip": generation, "workload": name, "pass": pass_, "ours": mine[pass_],
                         "splash": theirs[pass_],
                         "mxu_bound_cycles": mxu_cycles(generation, work, pass_)}
                    )  # fmt: skip
                    print(row(records[-1]), flush=True)
            bench.write(records, options.out / f"tpu_cost_{generation}.json")
    found = [options.out / f"tpu_cost_{generation}.json" for generation in tpu_schedule.GENERATIONS]
    recorded = [json.loads(path.read_text())["results"] for path in found if path.exists()]
    text = bench.table([row(record) for records in recorded for record in records])
    (options.out / "tpu_cost.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
