"""Confirms the TPU kernels on a TPU: the whole contract suite, then timings beside splash.

    python -m experiments.kernels.tpu_check

Writes results/tpu_check.json; exits with 1 if a case fails. Without a TPU, `--interpret` runs the
cases in interpret mode, without timings.
"""

import argparse
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp

from experiments.kernels import bench, tpu_cost
from sparse_attn.ops import attend as attend_lib
from tests.ops import contract, problems

RESULTS = pathlib.Path(__file__).parent / "results" / "tpu_check.json"


def run_case(case: problems.Case) -> dict[str, Any]:
    """One contract case; what failed, if it did."""
    try:
        contract.check(case, "pallas_tpu")
    except Exception as error:  # Whatever it is, it belongs in the record.
        return {"case": case.name, "passed": False, "error": str(error)[:500]}
    return {"case": case.name, "passed": True}


def random_arrays(args):
    keys = jax.random.split(jax.random.key(0), len(args))
    return [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, args, strict=True)]


def time_workload(work: tpu_cost.Workload) -> dict[str, Any]:
    """Milliseconds of ours and of splash, forward and with gradients."""
    q, k, v = random_arrays(tpu_cost.shapes(tpu_cost.LENGTH, splash=False, batch=1))
    ids = work.segment_ids
    if ids is not None:
        ids = jnp.broadcast_to(jnp.asarray(ids), q.shape[:2])

    def ours(q, k, v):
        return attend_lib.attend(q, k, v, mask=work.mask, segment_ids=ids, impl="pallas_tpu")

    candidates = {
        "ours forward": (jax.jit(ours), q, k, v),
        "ours forward + backward": (jax.jit(tpu_cost.gradient(ours)), q, k, v),
    }
    if work.variant != "array":
        kernel = tpu_cost.splash_kernel(work.splash, tpu_cost.SPLASH_BLOCKS[0])

        def splash(q, k, v):
            return tpu_cost.call_splash(kernel, q, k, v, ids)

        heads_first = [x.swapaxes(1, 2) for x in (q, k, v)]
        candidates["splash forward"] = (jax.jit(splash), *heads_first)
        candidates["splash forward + backward"] = (
            jax.jit(tpu_cost.gradient(splash)), *heads_first
        )  # fmt: skip
    timings = bench.time_side_by_side(candidates)
    return {name: {"median_ms": t.median, "spread_ms": t.spread} for name, t in timings.items()}


def main() -> None:
    """Runs, prints and records."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", help="names of contract cases; default all")
    parser.add_argument("--interpret", action="store_true", help="without a TPU: cases only")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    on_tpu = jax.default_backend() == "tpu"
    if not on_tpu and not options.interpret:
        sys.exit(f"tpu_check needs a TPU, this is {jax.default_backend()}; or pass --interpret")
    chosen = [c for c in contract.CASES if options.cases is None or c.name in options.cases]
    cases = []
    for case in chosen:
        cases.append(run_case(case))
        print("ok  " if cases[-1]["passed"] else "FAIL", case.name, flush=True)
    timings = {}
    if on_tpu:
        for name, work in tpu_cost.workloads().items():
            timings[name] = time_workload(work)
            print(name, timings[name], flush=True)
    bench.write({"cases": cases, "timings": timings}, options.out)
    failed = [c["case"] for c in cases if not c["passed"]]
    print(f"{len(cases) - len(failed)} of {len(cases)} cases passed, recorded in {options.out}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
