"""Many command lines of `launch.py` for the price of one start."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[2]
# Importing takes seconds and a mistake is found in milliseconds, so each command line runs in a
# fork of a process that has imported everything; the program itself starts from its first line.
_FORKS = """
import gc, json, os, runpy, sys
import configs.quickstart
import sparse_attn.launch.engine, sparse_attn.launch.starters, sparse_attn.launch.units
import sparse_attn.train.config_check, sparse_attn.train.profiling

def run(arguments, stdout, stderr):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = ["launch.py", *arguments]
    runpy.run_path("launch.py", run_name="__main__")
    sys.exit()

gc.freeze()  # What is imported is not searched for garbage when a fork ends.
codes = [run(*line) for line in json.load(sys.stdin)]
print(json.dumps(codes))
"""


def launch_each(
    lines: Sequence[Sequence[object]], folder: pathlib.Path
) -> list[subprocess.CompletedProcess]:
    """What `python launch.py` with the arguments of each line says; `folder` is for its outputs."""
    lines = [[str(word) for word in line] for line in lines]
    files = [(folder / f"{i}.stdout", folder / f"{i}.stderr") for i in range(len(lines))]
    work = [(line, str(out), str(err)) for line, (out, err) in zip(lines, files, strict=True)]
    done = subprocess.run(
        [sys.executable, "-c", _FORKS], input=json.dumps(work), cwd=ROOT,
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [
        subprocess.CompletedProcess(line, code, out.read_text(), err.read_text())
        for line, code, (out, err) in zip(lines, json.loads(done.stdout), files, strict=True)
    ]
