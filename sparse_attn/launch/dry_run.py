"""What a run will need, before it is paid for: built and compiled for devices that are not here.

    python launch.py --config=configs/lm.py:1.3b,window --dry-run --topology=v5e:16x16
    python launch.py --config=configs/quickstart.py --sweep=patterns --dry-run --topology=cpu:8

The step is the one that `train.main` runs, for the mesh of the config over the devices of the
topology. FLOPs come from the masks, memory and collectives from the program that the devices' own
compiler makes (TPUs), or XLA's for CPU (`cpu:8`, and as an estimate NVIDIA GPUs). Exit codes:
0 it fits, 2 the config is wrong, 71 the memory of a device is too small.
"""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import PartitionSpec as P
from ml_collections import config_flags

from sparse_attn.launch import engine, hlo, units
from sparse_attn.launch import topology as topology_lib
from sparse_attn.ops import tiles
from sparse_attn.parallel import mesh as mesh_lib
from sparse_attn.patterns import causal, full
from sparse_attn.train import config_check, exits, flops, optim, out_of_memory, tasks
from sparse_attn.train import state as state_lib

MODULE = "sparse_attn.launch.dry_run"
_GIB = 2**30
_ESTIMATE = (
    "estimate: a program for GPUs cannot be compiled without one. XLA's compiler for CPU made this "
    "one, with attention in plain JAX, for as many simulated devices: arguments and the kinds of "
    "collectives are those of the GPUs; temporaries are not, as it computes bfloat16 in float32"
)


def run(
    work: Sequence[units.WorkUnit],
    workdir: str,
    *,
    topology: topology_lib.Topology,
    as_json: bool = False,
) -> int:
    """A dry run of each unit, in a process of its own; the largest of their exit codes."""
    del workdir  # Nothing is written.
    path = os.pathsep.join(filter(None, (engine.ROOT, os.environ.get("PYTHONPATH"))))
    codes = []
    for unit in work:
        given = [a for a in unit.command()[3:] if a.startswith("--config")]
        command = [sys.executable, "-m", MODULE, *given, f"--topology={topology.name}"]
        command += ["--json"] if as_json else []
        codes.append(subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode)
    return max(codes)


def report(config: Mapping[str, Any], topology: topology_lib.Topology) -> dict[str, Any]:
    """Everything about one training step of a config on a topology, as JSON values.

    `topology.prepare` must have been called. `fits` tells whether the memory is enough; if not,
    `largest_buffers` and `remedies` tell what is in it and which flags need less.

    Raises:
      ValueError: the config cannot be built, or not on that topology.
    """
    if topology.simulated:
        config = {**config, "model": {**config["model"], "impl": None}}
    devices = topology.devices()
    mesh = mesh_lib.make(config["mesh"]["axes"], devices=devices)
    with jax.set_mesh(mesh), tiles.assume(topology.target()):
        task = tasks.of(config, mesh if mesh.size > 1 else None)
        traced, state, trace_s = _trace(config, task, mesh)
        found = {
            "name": config["name"],
            "topology": topology.name,
            "device": topology.kind,
            "devices": mesh.size,
            "devices_there": len(devices),
            "mesh": dict(mesh.shape),
            "sequence": config["mesh"]["sequence"] if mesh.shape["seq"] > 1 else None,
            "imbalance": tasks.imbalance(task, mesh),
            "estimate": _ESTIMATE if topology.simulated else None,
            "params": state_lib.num_params(state.params),
            "rows": config["data"]["batch_size"],
            "row_tokens": task.row_tokens,
            "tokens_per_step": config["data"]["batch_size"] * task.row_tokens,
            **_flops(config, task, state.params, topology.kind, mesh.size),
            "layers": _layers(task),
            "trace_s": trace_s,
        }
        return found | _compiled(traced, config, task, topology, mesh.size)


def _trace(config, task, mesh):
    """The step of `train.main`, lowered; the shapes of the state; seconds."""
    start = time.perf_counter()
    optimizer, schedule = optim.of(config["optim"], steps=config["train"]["steps"])
    shapes = jax.eval_shape(
        lambda: state_lib.create(
            task.model, optimizer, key=jax.random.key(config["seed"]), inputs=task.inputs
        )
    )
    rules = config["mesh"]["rules"] or mesh_lib.RULES
    shardings = mesh_lib.shardings(mesh, shapes, rules=rules)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    step = state_lib.make_train_step(
        task.model,
        optimizer,
        grad_accum=config["optim"]["grad_accum"],
        schedule=schedule,
        shardings=shardings,
    )
    platform = "tpu" if tiles.target().platform == "tpu" else "cpu"
    batch = _batch(task, config["data"]["batch_size"], mesh)
    lowered = step.trace(state, batch).lower(lowering_platforms=(platform,))
    return lowered, shapes, time.perf_counter() - start


def _batch(task, rows: int, mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch, as `parallel.mesh.Batches` places it."""
    split = P(mesh_lib.ACTIVATIONS["batch"])

    def shape(dims, dtype, spec):
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct((rows, *dims), dtype, sharding=sharding)

    dims = task.inputs.shape[1:]
    if task.inputs.dtype != jnp.int32:  # Images, with a class each.
        return {
            "inputs": shape(dims, task.inputs.dtype, split),
            "targets": shape((), jnp.int32, split),
            "weights": shape((), jnp.float32, split),
        }
    tokens = P(*split, "seq")
    names = ("inputs", "targets", *state_lib.PACKING)
    return {
        **{name: shape(dims, jnp.int32, tokens) for name in names},
        "weights": shape(dims, jnp.float32, tokens),
    }


def _flops(config, task, params, kind, num_devices) -> dict[str, Any]:
    model = task.model.config
    dense = dataclasses.replace(
        model, pattern=causal.Causal() if model.pattern.causal else full.Full()
    )

    def of(model):
        return flops.utilization(
            model,
            params,
            context=task.row_tokens,
            batch_size=config["data"]["batch_size"],
            device_kind="NVIDIA H200",  # Any: the peak is not used.
            num_devices=1,
        )

    tokens = config["data"]["batch_size"] * task.row_tokens
    executed, peak = of(model).executed_per_step, flops.peak(kind)
    return {
        "useful_flops": of(model).useful_per_token * tokens,
        "executed_flops": executed,
        "dense_flops": of(dense).useful_per_token * tokens,
        "seconds_at_peak": None if peak is None else executed / peak / num_devices,
    }


def _layers(task) -> list[dict[str, Any]]:
    """Densities of each run of layers that have one mask."""
    model, found = task.model.config, []
    for i, (pattern, counted) in enumerate(
        zip(model.layer_patterns(), flops.layer_stats(model, task.row_tokens), strict=True)
    ):
        line = {
            "pattern": pattern.expression(),
            "token_density": counted.token_density,
            "block_density": counted.block_density,
        }
        if found and found[-1] == line | {k: found[-1][k] for k in ("first", "last")}:
            found[-1]["last"] = i
        else:
            found.append(line | {"first": i, "last": i})
    return found


def _compiled(lowered, config, task, topology, num_devices) -> dict[str, Any]:
    """What the compiler says: memory, collectives, time; or that the memory is too small."""
    start, said = time.perf_counter(), None
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory.is_out_of_memory(error):
            raise
        compiled, said = None, " ".join(str(error).splitlines()[0].split())[:300]
    found = {"compile_s": time.perf_counter() - start, "limit_bytes": topology.memory}
    program = None
    if compiled is not None:
        program = hlo.Program(compiled.as_text())
        found |= {"memory": _memory(compiled), "collectives": program.collectives()}
    needed = found["memory"]["total"] if compiled is not None else None
    found["fits"] = said is None and (topology.memory is None or needed <= topology.memory)
    if found["fits"]:
        return found
    found |= {"said": said, "remedies": out_of_memory.remedies(config, num_devices=num_devices)}
    if program is None:
        program, found["buffers_on"] = _on_roomy(config, topology)
    found["largest_buffers"] = [] if program is None else program.largest_buffers()
    return found


def _memory(compiled) -> dict[str, int]:
    """Bytes of one device."""
    stats = compiled.memory_analysis()
    parts = {
        "arguments": stats.argument_size_in_bytes,
        # Results that do not take the place of an argument.
        "results": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "program": stats.generated_code_size_in_bytes,
    }
    return parts | {"total": sum(parts.values())}


def _on_roomy(config, topology):
    """The same step for the TPU with most memory: a compiler that ran out shows no buffers."""
    roomy = topology.roomy()
    if roomy is None:
        return None, None
    mesh = mesh_lib.make(config["mesh"]["axes"], devices=roomy.devices())
    with jax.set_mesh(mesh), tiles.assume(roomy.target()):
        task = tasks.of(config, mesh if mesh.size > 1 else None)
        try:
            compiled = _trace(config, task, mesh)[0].compile()
        except jax.errors.JaxRuntimeError:
            return None, None
    return hlo.Program(compiled.as_text()), roomy.name


def text(found: Mapping[str, Any]) -> str:
    """A report for people."""
    mesh = " ".join(f"{k}={v}" for k, v in found["mesh"].items())
    unused = found["devices_there"] - found["devices"]
    lines = [
        f"{found['name']} on {found['topology']}: {found['devices']} x {found['device']}"
        f"{f' ({unused} unused)' if unused else ''}, mesh {mesh}"
        f"{f', {x}' if (x := found['sequence']) else ''}",
        f"  parameters     {found['params']:,}",
        f"  tokens a step  {found['tokens_per_step']:,} ({found['rows']} rows of "
        f"{found['row_tokens']:,})",
        f"  FLOPs a step   useful {found['useful_flops']:.3g}, executed "
        f"{found['executed_flops']:.3g}, dense {found['dense_flops']:.3g}"
        f"{f'; {s:.3g} s at the peak' if (s := found['seconds_at_peak']) else ''}",
    ]
    for layer in found["layers"]:
        name = f"{layer['first']}-{layer['last']}"
        token = layer["token_density"]
        lines.append(
            f"  layers {name:<8}density {'' if token is None else f'{token:.2%} of pairs, '}"
            f"{layer['block_density']:.2%} of blocks: {layer['pattern']}"
        )
    if imbalance := found["imbalance"]:
        taken = found["sequence"].partition(":")[2] or "text"
        others = ", ".join(f"{x:.2f} {kind}" for kind, x in imbalance.items() if kind != taken)
        lines.append(
            f"  attention      busiest of {found['mesh']['seq']} ranks / mean: "
            f"{imbalance[taken]:.2f} in the order {taken}{f' ({others})' if others else ''}"
        )
    limit = found["limit_bytes"]
    of = "" if limit is None else f" of {limit / _GIB:.1f}"
    if memory := found.get("memory"):
        parts = ", ".join(f"{k} {v / _GIB:.2f}" for k, v in memory.items() if k != "total")
        lines.append(f"  memory, GiB    {memory['total'] / _GIB:.2f}{of} per device: {parts}")
    if (collectives := found.get("collectives")) is not None:
        parts = [f"{k} {v['bytes'] / _GIB:.3g} GiB in {v['count']}" for k, v in collectives.items()]
        lines.append(f"  collectives    {'; '.join(parts) or 'none'}; per device and step")
    lines.append(f"  seconds        trace {found['trace_s']:.1f}, compile {found['compile_s']:.1f}")
    if found["estimate"]:
        lines.append(f"  {found['estimate']}")
    if found["fits"]:
        return "\n".join([*lines, "  fits" if limit is not None else "  compiles"])
    lines.append(f"  DOES NOT FIT   {found['said'] or 'more than the memory of a device'}")
    if found.get("buffers_on"):
        lines.append(f"  largest buffers, compiled for {found['buffers_on']}, which has room:")
    elif found["largest_buffers"]:
        lines.append("  largest buffers:")
    for b in found["largest_buffers"]:
        lines.append(
            f"    {b['copies']} x {b['bytes'] / _GIB:.2f} GiB  {b['shape']}  {b['origin']}"
        )
    lines.append(f"  to need less, in this order: {' '.join(found['remedies'])}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Runs the command line of one unit."""
    logging.getLogger("sparse_attn").setLevel(logging.ERROR)
    try:
        if argv[1:]:
            raise ValueError(f"argument {argv[1]!r} must be a flag such as --topology=v5e:16x16")
        topology = topology_lib.parse(flags.FLAGS.topology)
        topology.prepare()
        found = report(flags.FLAGS["config"].value.to_dict(), topology)
    except (ValueError, NotImplementedError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return int(exits.ExitCode.USAGE)
    print(json.dumps(found) if flags.FLAGS.json else text(found), flush=True)
    return int(exits.ExitCode.FINISHED if found["fits"] else exits.ExitCode.OUT_OF_MEMORY)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "FILE.py[:ARGUMENT]")
    flags.DEFINE_string("topology", None, "Devices, such as v5e:16x16 or cpu:8.", required=True)
    flags.DEFINE_bool("json", False, "Print one line of JSON.")
    app.run(main, flags_parser=config_check.parse_flags)
