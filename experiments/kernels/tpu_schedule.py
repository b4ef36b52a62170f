"""The TPU compiler's schedule of a kernel, without a TPU: VLIW bundles by part, and slots used."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from sparse_attn.ops import tiles

GENERATIONS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# Matrix units of a core, and cycles that one takes for 16 rows (a `vmatmul` of bfloat16; one of
# float32 has 8): those of v6e have 256 lanes, which products of 128 fill by half, and take two rows
# a cycle.
MXU = {"v4": (4, 16), "v5e": (4, 16), "v5p": (4, 16), "v6e": (2, 8)}
UTILIZATION = "final_hlo-static-per-bundle-utilization.txt"


@dataclasses.dataclass
class Kernel:
    """Cycles of one kernel. `bodies` hold the products: FULL then PARTIAL for ours.

    A bundle issues in one cycle; a body takes no less than its products take the matrix units
    (`products`), though the compiler may issue them in fewer bundles (`bundles`).
    """

    name: str
    bodies: list[int]
    bundles: list[int]
    products: list[int]
    first: int
    last: int
    rest: int
    slots: list[dict[str, float]]


def start(dump: str) -> None:
    """Tells libtpu, which is not loaded yet, to write its schedules."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=.*final.*"
    )
    jax.config.update("jax_platforms", "cpu")


def compile_kernels(generation: str, f: Callable, args: Any, dump: str) -> dict[str, Kernel]:
    """The kernels of `jit(f)` by name, and the memory that the program needs."""
    chip = device(generation)
    mesh = jax.sharding.Mesh([chip], ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    abstract = jax.sharding.AbstractMesh(
        (), (), abstract_device=jax.sharding.AbstractDevice(
            device_kind=chip.device_kind, num_cores=1, platform="tpu"
        ),
    )  # fmt: skip
    target = tiles.Target("tpu", chip.device_kind)
    with jax.sharding.use_abstract_mesh(abstract), tiles.assume(target):
        jax.jit(f).trace(*args).lower(lowering_platforms=("tpu",)).compile()
    kernels = {}
    for path in pathlib.Path(dump).glob("*-final_bundles.txt"):
        if "schedule-analysis" in path.name:
            continue
        if (kernel := read_kernel(path, MXU[generation])) is not None:
            kernels[kernel.name] = kernel
    for path in pathlib.Path(dump).iterdir():
        path.unlink()
    return kernels


def read_kernel(path: pathlib.Path, mxu: tuple[int, int]) -> Kernel | None:
    """Cuts a kernel's bundles at its predicated regions; None if it has no loop over products."""
    units, cycles = mxu
    bundles = read_bundles(path)
    starts, ends = {}, {}
    for at, text in enumerate(bundles):
        for side, found in ((starts, r"Start region (\d+)"), (ends, r"End region (\d+)")):
            side.update({int(n): at for n in re.findall(found, text)})
    regions = sorted((starts[r], ends[r]) for r in starts if r in ends)
    products = np.cumsum([0] + [text.count("vmatmul") for text in bundles])
    with_products = [(a, b) for a, b in regions if products[b + 1] > products[a]]
    bodies = [
        (a, b) for a, b in with_products
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in with_products)
    ]  # fmt: skip
    if not bodies:
        return None
    around = [(a, b) for a, b in regions if a <= bodies[0][0] and b >= bodies[-1][1]]
    loops = [r for r in around if r not in bodies]
    if not loops:  # XLA's own products, of a cumulative sum for instance.
        return None
    loop = max(loops, key=lambda r: r[1] - r[0])
    size = lambda region: region[1] - region[0] + 1  # noqa: E731
    near = 40  # Bundles between neighbouring regions, at most.
    opening = [r for r in regions if bodies[0][0] - near < r[1] < bodies[0][0]]
    closing = [r for r in regions if bodies[-1][1] < r[0] < bodies[-1][1] + near]
    first = max(map(size, opening), default=0)
    last = max(map(size, closing), default=0)
    slots, table = utilization(path, len(bundles))
    shares = [
        dict(zip(slots, table[a : b + 1].mean(0).round(3).tolist(), strict=True)) for a, b in bodies
    ]
    lengths = [size(r) for r in bodies]
    name = re.sub(r"^\d+-", "", path.name).split("-")[0]
    rest = size(loop) - sum(lengths) - first - last
    rows = [
        8 * text.count("vmatmul") + 8 * len(re.findall(r"vmatmul\S*bf16", text)) for text in bundles
    ]
    in_products = [sum(rows[a : b + 1]) * cycles // (16 * units) for a, b in bodies]
    cycles_of = [max(pair) for pair in zip(lengths, in_products, strict=True)]
    return Kernel(name, cycles_of, lengths, in_products, first, last, rest, shares)


def device(generation: str) -> jax.Device:
    """A chip of the generation that programs can be compiled for."""
    name = GENERATIONS[generation]
    return topologies.get_topology_desc(topology_name=name, platform="tpu").devices[0]


def read_bundles(path: pathlib.Path) -> list[str]:
    bundles: list[str] = []
    for line in path.read_text().split("\n"):
        if re.match(r"\s*(0x[0-9a-f]+|0)\s+\w*\s*:", line):
            bundles.append(line)
        elif bundles:
            bundles[-1] += line
    return bundles


def utilization(path: pathlib.Path, bundles: int) -> tuple[list[str], np.ndarray]:
    """Names of the slots of a bundle, and the share of each that every bundle uses.

    Read from the file that the compiler writes beside `path`; which slots it tells apart depends on
    the version of libtpu.

    Raises:
        ValueError: No file beside it has a line per bundle and a number per slot.
    """
    program = re.sub(r"-\d+-final_bundles.txt$", "", path.name)
    for beside in path.parent.iterdir():
        if beside.name.startswith(f"{program}-") and beside.name.endswith(UTILIZATION):
            head, _, rows = beside.read_text().partition("== UTILIZATION:\n")
            _, names, capacity = head.strip().split("\n")
            slots = [name.strip().lower() for name in names.split(",")]
            table = np.array(rows.split(), int)
            if table.size == bundles * len(slots):
                return slots, table.reshape(bundles, -1) / np.array(capacity.split(), int)
    raise ValueError(
        f"{path.name} has {bundles} bundles, and no table beside it has a line for each: the dump"
        " is incomplete, or its format changed"
    )
