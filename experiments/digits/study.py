"""Test accuracy of four patterns of a small vision transformer on digits; see README.md.

python -m experiments.digits.study    # 12 runs, about 5 minutes on 2 cores
"""

import contextlib
import io
import json
import os
import pathlib
import statistics
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Twelve tiny models: compilation is half the time.

from configs import vit
from experiments.kernels import bench
from sparse_attn.train import exits
from sparse_attn.train import main as train_main

RESULTS = pathlib.Path(__file__).parent / "results"
SEEDS = range(3)
LEAST_ACCURACY = 0.95  # of every run
KEPT = ("pattern", "params", "steps", "test_accuracy", "test_loss", "token_density")


def run(name: str, seed: int, folder: pathlib.Path) -> dict:
    """One run of the config, from its start to its summary."""
    config = vit.get_config(name)
    config.seed = seed
    config.train.log_every = config.train.checkpoint_every = config.train.steps
    with contextlib.redirect_stdout(io.StringIO()):
        code = train_main.train(config, folder)
    if code != exits.ExitCode.FINISHED:
        raise RuntimeError(f"{name}, seed {seed} ended with {code!r}")
    summary = json.loads((folder / "summary.json").read_text())
    return {"name": name, "seed": seed} | {key: summary[key] for key in KEPT}


def table(runs: list[dict]) -> str:
    """Markdown: one line per pattern, over its seeds."""
    lines = []
    for name in dict.fromkeys(r["name"] for r in runs):
        mine = [r for r in runs if r["name"] == name]
        accuracies = [r["test_accuracy"] for r in mine]
        lines.append(
            {
                "pattern": name,
                "visible pairs": f"{mine[0]['token_density']:.1%}",
                "parameters": f"{mine[0]['params']:,}",
                "mean accuracy": f"{statistics.mean(accuracies):.1%}",
                "least": f"{min(accuracies):.1%}",
                "most": f"{max(accuracies):.1%}",
            }
        )
    return bench.table(lines)


def main() -> int:
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for name in vit.COMPARED:
            for seed in SEEDS:
                runs.append(run(name, seed, pathlib.Path(folder, f"{name}-{seed}")))
                accuracy = runs[-1]["test_accuracy"]
                print(f"{name}, seed {seed}: test accuracy {accuracy:.4f}", flush=True)
    bench.write(runs, RESULTS / "digits.json")
    (RESULTS / "digits.md").write_text(table(runs) + "\n")
    print(f"\n{table(runs)}\n\nwritten to {RESULTS}")
    return 0 if min(r["test_accuracy"] for r in runs) > LEAST_ACCURACY else 1


if __name__ == "__main__":
    sys.exit(main())
