"""Checks the Triton kernels on an NVIDIA GPU: every case of the contract suite, against float32.

    python -m experiments.kernels.triton_check [--shards 8] [--out DIR]
    python -m experiments.kernels.gpu_bench --kernel triton_gpu    # and their speed

Ends with the number of failed cases; the results file names each.
"""

import argparse
import json
import os
import pathlib
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # Shards share the GPU.

import jax

from experiments.kernels import bench


def run(shard: int, shards: int) -> None:
    """Prints a result for every `shards`-th case."""
    from tests.ops import contract

    for case in contract.CASES[shard::shards]:
        result = {"case": case.name, "ok": True}
        try:
            contract.check(case, "triton_gpu")
        except Exception as error:  # The other cases still count.
            result |= {"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
        bench.shard_result(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=8, help="processes")
    parser.add_argument("--shard", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", default="experiments/kernels/results", help="folder of the file")
    options = parser.parse_args()
    if options.shard is not None:
        run(options.shard, options.shards)
        return
    results = []
    for result in bench.in_shards("experiments.kernels.triton_check", options.shards):
        print("ok  " if result["ok"] else "FAIL", result["case"], flush=True)
        results.append(result)
    name = bench.file_stem(jax.devices()[0].device_kind)
    bench.write(results, pathlib.Path(options.out) / f"triton_check_{name}.json")
    from tests.ops import contract

    bad = [r for r in results if not r["ok"]]
    print(f"{len(results)} of {len(contract.CASES)} cases ran, {len(bad)} failed")
    for result in bad:
        print(json.dumps(result))
    sys.exit(len(bad) + len(contract.CASES) - len(results))


if __name__ == "__main__":
    main()
