"""The mesh: its axes, which of them each parameter and activation is split over, and batches.

Axes: `data` (copies of the model), `fsdp` (parameters split, gathered where they are used
[arXiv:2304.11277]), `seq` (tokens of one row) and `tensor` (heads and MLP columns
[arXiv:1909.08053, sec. 3]). Rows of a batch are split over `data` and `fsdp` together. The compiler
moves the data (axes are `Auto`); only attention is written out, in `parallel/attention.py`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree

AXES = ("data", "fsdp", "seq", "tensor")
# What the letters of an activation are split over; see `shard`.
ACTIVATIONS = {"batch": ("data", "fsdp"), "length": ("seq",), "heads": ("tensor",)}

# (regular expression of the path, mesh axes of each dimension): the first that is found decides.
# Paths and shapes are those of `models.Transformer` and `models.VisionTransformer`; the first
# dimension of a layer's array counts layers.
RULES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    (r"(embedding|output|position|registers|patch_embedding/kernel)$", (None, "fsdp")),
    (r"head/kernel$", ("fsdp", None)),
    (r"attention/(query|key|value)(_compressed|_window)?/kernel$", (None, "fsdp", "tensor", None)),
    (r"attention/out/kernel$", (None, "tensor", None, "fsdp")),
    (r"attention/sink_logits$", (None, "tensor")),
    (r"attention/(query|key|value)(_compressed|_window)?_taps$", (None, None, "tensor", None)),
    (r"attention/gate_in$", (None, "fsdp", None)),
    (r"attention/gate_out$", (None, None, "tensor", None)),
    (r"attention/(key|value)_(positions|compress_in|compress_out)$", ()),
    (r"attention/latent/kernel$", (None, "fsdp", "tensor", None)),
    (r"attention/key_rope/kernel$", (None, "fsdp", None, None)),
    (r"attention/(key|value)_up$", (None, None, None, "tensor", None)),
    (r"mlp/(gate|up)/kernel$", (None, "fsdp", "tensor")),
    (r"mlp/down/kernel$", (None, "tensor", "fsdp")),
    (r"(scale|bias|gate_query|gate_key)$", ()),
)


def sizes(axes: str | Mapping[str, int], *, num_devices: int) -> dict[str, int]:
    """Size of every axis, from `"data=-1,tensor=2"` or a dict; -1 takes the devices left over.

    Axes that are not named have size 1.

    Raises:
      ValueError: an axis is unknown, a size is not an integer >= 1 (one may be -1), or the sizes
        do not divide the devices.

    >>> sizes("data=-1,tensor=2", num_devices=8)
    {'data': 4, 'fsdp': 1, 'seq': 1, 'tensor': 2}
    """
    given = dict(axes) if isinstance(axes, Mapping) else {}
    if isinstance(axes, str):
        for part in filter(None, axes.replace(" ", "").split(",")):
            name, _, size = part.partition("=")
            if not re.fullmatch(r"-?\d+", size) or name in given:
                raise ValueError(f"mesh.axes={axes!r} must be axis=size,..., each axis once")
            given[name] = int(size)
    for name, size in given.items():
        if name not in AXES:
            raise ValueError(f"mesh.axes={axes!r}: {name!r} must be one of {', '.join(AXES)}")
        if size < 1 and size != -1:
            raise ValueError(f"mesh.axes={axes!r}: {name}={size} must be >= 1, or -1 for the rest")
    named = math.prod(size for size in given.values() if size > 0)
    free = [name for name, size in given.items() if size == -1]
    if len(free) > 1 or (free and num_devices % named):
        raise ValueError(
            f"mesh.axes={axes!r} must have one -1 at most, and sizes that divide the "
            f"{num_devices} devices"
        )
    if named > num_devices:
        raise ValueError(f"mesh.axes={axes!r} needs {named} devices, there are {num_devices}")
    given |= dict.fromkeys(free, num_devices // named)
    return {name: given.get(name, 1) for name in AXES}


def make(
    axes: str | Mapping[str, int], *, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """The mesh of `axes` (see `sizes`) over all devices, or over the first ones if fewer are named.

    Use it as `with jax.set_mesh(mesh):` around everything that is traced.

    Raises:
      ValueError: `axes` is malformed, or names fewer devices than several processes have.

    >>> make("data=1").shape["data"]
    1
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = sizes(axes, num_devices=len(devices))
    count = math.prod(shape.values())
    if count < len(devices) and len({d.process_index for d in devices}) > 1:
        raise ValueError(
            f"mesh.axes={axes!r} names {count} devices; several processes need all "
            f"{len(devices)}: give one axis -1"
        )
    return jax.make_mesh(
        tuple(shape.values()),
        AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
        devices=devices[:count],
    )


def current() -> jax.sharding.AbstractMesh | None:
    """The mesh of `jax.set_mesh`, None where there is none or inside `jax.shard_map`.

    Raises:
      ValueError: the mesh has other axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or set(mesh.axis_types) != {jax.sharding.AxisType.Auto}:
        return None
    if mesh.axis_names != AXES:
        raise ValueError(f"mesh axes {mesh.axis_names} must be {AXES}; `parallel.mesh.make` them")
    return mesh


def axes_of(mesh: Any, letter: str, size: int) -> tuple[str, ...] | None:
    """Mesh axes that a dimension of an activation is split over; None where they do not divide it.

    A single row to sample from, say, is then computed by all, which is right if not fast.
    """
    names = tuple(a for a in ACTIVATIONS[letter] if mesh.shape.get(a, 1) > 1)
    return names if names and size % math.prod(mesh.shape[a] for a in names) == 0 else None


def shard(x: Array, *letters: str | None) -> Array:
    """Says how an activation lies on the current mesh: `shard(x_BTD, "batch", "length", None)`.

    Without a mesh it gives `x` itself.

    >>> shard(jax.numpy.ones((2, 4)), "batch", None).shape
    (2, 4)
    """
    mesh = current()
    if mesh is None:
        return x
    spec = (None if a is None else axes_of(mesh, a, n) for a, n in zip(letters, x.shape))
    return jax.lax.with_sharding_constraint(x, P(*spec))


def parameter_specs(
    tree: PyTree, *, rules: Sequence[tuple[str, Sequence[Any]]] = RULES
) -> PyTree[P]:
    """How each array of a state lies on the mesh, by the first rule found in its path.

    The moments of an optimizer end in the path of their parameter and lie as it does; scalars and
    typed keys are on every device.

    Args:
      tree: arrays or `ShapeDtypeStruct`s; params, or a whole `TrainState`.
      rules: (regular expression, axes): an axis name, a tuple of names or None per dimension; ()
        = the whole array on every device.

    Raises:
      ValueError: no rule matches a path, or a rule has another number of dimensions or an unknown
        axis.

    >>> tuple(parameter_specs({"mlp/up/kernel": np.ones((2, 4, 8))})["mlp/up/kernel"])
    (None, 'fsdp', 'tensor')
    """

    def spec(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not x.ndim:
            return P()
        found = next((rule for rule in rules if re.search(rule[0], name)), None)
        if found is None:
            raise ValueError(f"mesh.rules: none matches {name!r} of shape {list(x.shape)}")
        pattern, axes = found
        named = [a for axis in axes for a in ((axis,) if isinstance(axis, str) else axis or ())]
        if len(axes) not in (0, x.ndim) or not set(named) <= set(AXES):
            raise ValueError(
                f"mesh.rules: {pattern!r} gives {tuple(axes)} for {name!r} of shape "
                f"{list(x.shape)}; it must name an axis of {', '.join(AXES)} or None for each "
                "dimension, or be empty"
            )
        return P(*(tuple(axis) if isinstance(axis, list) else axis for axis in axes))

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(
    mesh: jax.sharding.Mesh,
    tree: PyTree,
    *,
    rules: Sequence[tuple[str, Sequence[Any]]] = RULES,
) -> PyTree[jax.sharding.NamedSharding]:
    """`parameter_specs` on a mesh, checked against the shapes.

    Raises:
      ValueError: as `parameter_specs`, or a dimension is not a multiple of its axes' sizes.

    >>> mesh = make("data=1")
    >>> shardings(mesh, {"bias": np.ones(3)})["bias"].is_fully_replicated
    True
    """

    def sharding(path, x, spec):
        for size, axis in zip(x.shape, spec):
            names = (axis,) if isinstance(axis, str) else axis or ()
            parts = math.prod(mesh.shape[a] for a in names)
            if size % parts:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(
                    f"mesh axes {', '.join(names)} have size {parts}, which must divide each "
                    f"dimension they split; {name!r} is {list(x.shape)}. Change mesh.axes, or "
                    "mesh.rules for it"
                )
        return jax.sharding.NamedSharding(mesh, spec)

    specs = parameter_specs(tree, rules=rules)
    return jax.tree_util.tree_map_with_path(sharding, tree, specs)


class Batches:
    """What each process reads of a batch, and the global arrays that its rows become.

    Processes whose devices hold the same rows (`seq` or `tensor` across processes) read the same
    rows. A change of the mesh or of the number of processes changes which rows are in no batch; it
    may change their order, where the devices of a process are not neighbours in the mesh.

    Attributes:
      shard_index, shard_count: for `data.text.loader`: this process reads rows
        `[shard_index * b, (shard_index + 1) * b)`, b = batch_size / shard_count.

    Raises:
      ValueError: the mesh does not divide the rows or the tokens of a row.

    >>> batches = Batches(make("data=1"), batch_size=4, length=8)
    >>> batches.shard_index, batches.shard_count
    (0, 1)
    >>> batches.place({"inputs": np.ones((4, 8), np.int32)})["inputs"].shape
    (4, 8)
    """

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        *,
        batch_size: int,
        length: int,
        places: np.ndarray | None = None,
    ):
        """`places` is the token that stands at each place of a row, where that is not the order
        of the text (`balance.py`)."""
        rows = math.prod(mesh.shape[a] for a in ACTIVATIONS["batch"])
        if batch_size % rows:
            raise ValueError(
                f"data.batch_size={batch_size} must be a multiple of data * fsdp = {rows}"
            )
        if places is None and length % mesh.shape["seq"]:
            raise ValueError(f"data.context={length} must be a multiple of seq={mesh.shape['seq']}")
        self._places = places
        self._shape = (batch_size, length)
        self._sharding = jax.sharding.NamedSharding(mesh, P(ACTIVATIONS["batch"], "seq"))
        held: dict[int, set[tuple[int, int]]] = {}
        for device, index in self._sharding.devices_indices_map(self._shape).items():
            held.setdefault(device.process_index, set()).add(index[0].indices(batch_size)[:2])
        self._read, sets = rows_read(held, batch_size=batch_size)
        self.shard_index, self.shard_count = sets[jax.process_index()], len(set(sets.values()))
        self._first = self.shard_index * (batch_size // self.shard_count)

    def place(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """The global arrays `[batch_size, ...]` of the rows that this process read, or of all.

        Arrays `[batch_size, length]` are tokens; others are split by row only.
        """

        def put(x):
            tokens = x.ndim == 2 and x.shape[1] == self._shape[1]
            if tokens and self._places is not None:
                x = x[:, self._places]
            first = 0 if len(x) == self._shape[0] else self._first
            rows = self._sharding.spec[0]
            sharding = jax.sharding.NamedSharding(
                self._sharding.mesh, P(rows, "seq") if tokens else P(rows)
            )

            def part(index):
                lo, hi, _ = index[0].indices(self._shape[0])
                start = int(self._read[lo]) - first
                return x[(slice(start, start + hi - lo), *index[1:])]

            shape = (self._shape[0], *x.shape[1:])
            return jax.make_array_from_callback(shape, sharding, part)

        return {name: put(x) for name, x in batch.items()}


def rows_read(
    held: Mapping[int, set[tuple[int, int]]], *, batch_size: int
) -> tuple[Int[np.ndarray, "rows"], dict[int, int]]:
    """Which row that is read goes to each row of the batch, and the share that a process reads.

    A process reads consecutive rows. A mesh follows the wires between the devices of a pod, so
    those of a process may be anywhere in it: rows are then put into another order, in blocks.

    Args:
      held: by process, the (first, end) rows that its devices hold.
      batch_size: rows.

    Raises:
      ValueError: two processes hold some of their rows in common and not all, or not equally many.

    >>> rows, shares = rows_read({0: {(0, 1), (2, 3)}, 1: {(1, 2), (3, 4)}}, batch_size=4)
    >>> rows.tolist(), shares
    ([0, 2, 1, 3], {0: 0, 1: 1})
    """
    blocks = {process: tuple(sorted(of)) for process, of in held.items()}
    sets = sorted(set(blocks.values()))
    rows = [[row for lo, hi in of for row in range(lo, hi)] for of in sets]
    order = np.array([row for of in rows for row in of])
    if len(set(map(len, rows))) > 1 or not np.array_equal(np.sort(order), np.arange(batch_size)):
        raise ValueError(
            f"processes would hold rows {sets} of {batch_size}: they must hold equally many, and "
            "the same ones or none in common; change mesh.axes"
        )
    return np.argsort(order), {process: sets.index(of) for process, of in blocks.items()}
