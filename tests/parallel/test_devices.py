"""Eight simulated devices, in a pytest process of its own: on_devices*.py."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = ("tests/parallel/on_devices.py", "tests/parallel/on_devices_choices.py")
# Programs are compiled once each and run for milliseconds: optimising them is not worth it.
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_emitter_verification_level=0"
)


def run(selection, *options):
    arguments = [*options, "-q", "-x", "-m", selection, "-p", "no:cacheprovider", "--durations=5"]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *FILES, *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.returncode == 0, process.stdout
    assert " passed" in process.stdout


def test_quick():
    run("not slow")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all(request):
    part = request.config.option.matrix_part
    run("slow", *([] if part is None else ["--matrix-part={}/{}".format(*part)]))
