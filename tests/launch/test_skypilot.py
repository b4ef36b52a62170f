"""The task files that SkyPilot gets, against the fields that its documentation lists."""

import shlex

import pytest
import yaml

from sparse_attn.launch import engine, skypilot, units

# docs.skypilot.co/en/latest/reference/yaml-spec.html, and for the recovery
# docs.skypilot.co/en/latest/examples/managed-jobs.html.
FIELDS = {
    "name": str, "workdir": str, "num_nodes": int, "resources": dict, "envs": dict,
    "file_mounts": dict, "setup": str, "run": str,
}  # fmt: skip
RESOURCES = {
    "infra": str, "accelerators": str, "accelerator_args": dict, "cpus": str, "memory": str,
    "use_spot": bool, "disk_size": int, "job_recovery": dict,
}  # fmt: skip
ARGS = {"runtime_version": str, "tpu_name": str, "tpu_vm": bool}
RECOVERY = {"strategy": str, "max_restarts_on_errors": int, "recover_on_exit_codes": list}

UNIT = units.WorkUnit(
    "003-ab12", "it's", "configs/quickstart.py:local",
    (("model.pattern", "local(window=64) | sinks(tokens=4)"), ("name", 'it\'s "odd": #1')),
    "/runs/x/003-ab12",
)  # fmt: skip


def check(content, fields):
    for name, value in content.items():
        assert isinstance(value, fields[name]), name


@pytest.mark.parametrize(
    "accelerators, runtime",
    [
        ("tpu-v6e-16", "v2-alpha-tpuv6e"),
        ("tpu-v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("tpu-v5p-8", "v2-alpha-tpuv5"),
        ("tpu-v4-8", "tpu-ubuntu2204-base"),
        ("H200:8", None),
    ],
)
def test_the_task_has_known_fields_and_the_printed_command(accelerators, runtime, capsys):
    task = yaml.safe_load(skypilot.task(UNIT, accelerators=accelerators))
    check(task, FIELDS)
    check(task["resources"], RESOURCES)
    check(task["resources"]["job_recovery"], RECOVERY)
    check(task["resources"].get("accelerator_args", {}), ARGS)
    assert task["resources"]["accelerators"] == accelerators
    assert task["resources"].get("accelerator_args", {}).get("runtime_version") == runtime
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert ("requirements-tpu.txt" in task["setup"]) == (runtime is not None)
    engine.run_print([UNIT], "/runs/x")
    assert task["run"] == capsys.readouterr().out
    assert shlex.split(task["run"]) == UNIT.command()


def test_every_unit_has_its_file_and_its_line(tmp_path, capsys):
    work = [UNIT, units.WorkUnit("004-cd", "b", "c.py", (), "/runs/x/004-cd")]
    assert skypilot.run(work, str(tmp_path), accelerators="tpu-v6e-16") == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines] == [["sky", "jobs", "launch"]] * 2
    for line, unit in zip(lines, work, strict=True):
        with open(line[-1]) as file:
            assert file.read() == skypilot.task(unit, accelerators="tpu-v6e-16")
