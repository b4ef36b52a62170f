"""The TPU kernels compile for every generation, by the TPU compiler and without a TPU."""

import contextlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from sparse_attn.masks import block_mask, lower
from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import tiles
from sparse_attn.patterns import causal, local, sinks

# No TPU is attached: the compiler must not look for one, and test processes may share its library.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

GENERATIONS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
LENGTHS = {"8k": 8192, "128k": 131072, "1M": 1 << 20}
STREAM = local.Local(window=4096) | sinks.Sinks(tokens=64)
HEADS, KV_HEADS = 2, 1


def device(generation):
    if importlib.util.find_spec("libtpu") is None:
        pytest.fail("libtpu is not installed: pip install -r requirements-dev.txt")
    topology = topologies.get_topology_desc(topology_name=GENERATIONS[generation], platform="tpu")
    return topology.devices[0]


@contextlib.contextmanager
def building_for(chip):
    """Traces and lowers for `chip`."""
    abstract = jax.sharding.AbstractDevice(
        device_kind=chip.device_kind, num_cores=1, platform="tpu"
    )
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=abstract)
    with (
        jax.sharding.use_abstract_mesh(mesh),
        tiles.assume(tiles.Target("tpu", chip.device_kind)),
    ):
        yield


def compile_for(generation, f, *args):
    chip = device(generation)
    mesh = jax.sharding.Mesh([chip], ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    with building_for(chip):
        lowered = jax.jit(f).trace(*args).lower(lowering_platforms=("tpu",))
    # Raises when a kernel needs more VMEM or SMEM than the chip has.
    return lowered.compile()


def gradients(f):
    """`f(q, k, v, ...)` forward and backward."""
    return jax.value_and_grad(lambda *a: f(*a).astype(jnp.float32).sum(), argnums=(0, 1, 2))


def arrays(length, head_dim, *, dtype=jnp.bfloat16, heads=HEADS, kv_heads=KV_HEADS, batch=1):
    q = jax.ShapeDtypeStruct((batch, length, heads, head_dim), dtype)
    k = jax.ShapeDtypeStruct((batch, length, kv_heads, head_dim), dtype)
    return q, k, k


def attend(*args, **kwargs):
    return attend_lib.attend(*args, **kwargs, impl="pallas_tpu")


def assert_linear(compiled, length, head_dim):
    """No buffer grows as T x S: all of them together stay near the arguments and results."""
    stats = compiled.memory_analysis()
    token = (2 * HEADS + 2 * KV_HEADS) * max(head_dim, 128)  # Numbers per token in q, k, v, out.
    assert stats.temp_size_in_bytes <= 32 * token * length
    if length >= LENGTHS["128k"]:
        assert stats.temp_size_in_bytes < length * length / 4


def static(length, head_dim):
    f = gradients(lambda q, k, v: attend(q, k, v, mask=STREAM))
    return f, arrays(length, head_dim)


def documents(length, head_dim):
    """Run-time lists: packed documents sharpen a static window."""
    # Sorting the lists of a million tokens in blocks of 128 takes XLA a minute to compile.
    block = 1024 if length > LENGTHS["128k"] else 128
    mask = lower.lower(STREAM, q_len=length, block_q=block, block_kv=block)
    f = gradients(lambda q, k, v, ids: attend(q, k, v, mask=mask, segment_ids=ids))
    return f, (*arrays(length, head_dim), jax.ShapeDtypeStruct((1, length), jnp.int32))


def selected(length, head_dim):
    """Run-time lists that are arguments of the jitted function."""
    blocks = -(-length // 512)
    mask = block_mask.from_block_states(
        np.ones((1, KV_HEADS, blocks, blocks), np.int32), rule=causal.Causal(),
        q_len=length, kv_len=length, block_q=512, block_kv=512,
    )  # fmt: skip
    f = gradients(lambda q, k, v, mask: attend(q, k, v, mask=mask))
    return f, (*arrays(length, head_dim), mask)


# Mask of every generation with each head_dim, whose lengths take turns: 8k, 128k, 1M of the first.
MASKS = {
    "v4": (static, static, documents),
    "v5e": (documents, static, selected),
    "v5p": (static, documents, static),
    "v6e": (documents, static, static),
}
FAST = (("v5e", 128, "8k", static),)
MORE = (("v6e", 64, "1M", static), ("v4", 256, "8k", documents))


def cells():
    """Every pair of generation, head_dim, length and static or run-time lists.

    What can fail is memory: VMEM goes by the generation and head_dim, scalar memory by the
    generation, the length and whether the lists are static. So each of those pairs is met; all four
    together would compile the same kernels three times as often. `selected` meets every generation
    in test_far_blocks_compile.
    """
    names = list(LENGTHS)
    drawn = []
    for i, generation in enumerate(GENERATIONS):
        for j, head_dim in enumerate((64, 128, 256)):
            drawn.append((generation, head_dim, names[(i + j) % 3], MASKS[generation][j]))
    for cell in dict.fromkeys([*FAST, *MORE, *drawn]):
        marks = [] if cell in FAST else [pytest.mark.slow]
        name = "-".join(map(str, (*cell[:3], cell[3].__name__)))
        yield pytest.param(*cell, id=name, marks=marks)


def test_every_pair_of_factors_is_a_cell():
    met = [(*param.values[:3], param.values[3] is static) for param in cells()]
    factors = (tuple(GENERATIONS), (64, 128, 256), tuple(LENGTHS), (True, False))
    for a, b in itertools.combinations(range(4), 2):
        assert {(cell[a], cell[b]) for cell in met} == {*itertools.product(factors[a], factors[b])}


@pytest.mark.parametrize("generation, head_dim, length, make", list(cells()))
def test_forward_and_backward_compile(generation, head_dim, length, make):
    f, args = make(LENGTHS[length], head_dim)
    compiled = compile_for(generation, f, *args)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') >= 2
    assert_linear(compiled, LENGTHS[length], head_dim)


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_far_blocks_compile(generation):
    """A run-time selection of single blocks: several tiles of keys in a step."""
    mask = block_mask.from_block_states(
        np.ones((1, KV_HEADS, 64, 64), np.int32), rule=causal.Causal(),
        q_len=8192, kv_len=8192, block_q=128, block_kv=128,
    )  # fmt: skip
    f = gradients(lambda q, k, v, mask: attend(q, k, v, mask=mask))
    compile_for(generation, f, *arrays(8192, 128), mask)


@pytest.mark.slow
def test_list_in_chunks_compiles():
    """Causal at 256k tokens lists more steps than scalar memory holds: a loop over calls."""
    length = 1 << 18
    f = gradients(lambda q, k, v: attend(q, k, v, mask=causal.Causal()))
    compiled = compile_for("v5e", f, *arrays(length, 128))
    assert "while" in compiled.as_text()
    assert_linear(compiled, length, 128)


EVERYTHING = {
    "soft_cap_sinks_bias": (causal.Causal(), dict(logits_soft_cap=30.0), True, 4, 2),
    "heads_differ": (
        tuple(local.Local(window=w) for w in (64, 512, 64, 2048)), {}, False, 4, 2,
    ),
    "wide_group": (causal.Causal(), {}, False, 8, 1),
    "widest_group": (causal.Causal(), {}, False, 16, 1),
    "multi_query": (causal.Causal(), {}, False, 32, 1),
    "one_head_per_key": (causal.Causal(), {}, False, 2, 2),
}  # fmt: skip


# Dtypes and generations take turns: a dtype changes the size of the tiles, whatever the feature.
# What adds arrays to the kernel, and what takes most of its memory, meets both sizes of a number.
DTYPES = (jnp.bfloat16, jnp.float32, jnp.float16)
FEATURES = [
    pytest.param(list(GENERATIONS)[(i + j) % 4], dtype, name, id=f"{name}-{dtype.__name__}")
    for i, name in enumerate(EVERYTHING)
    for j, dtype in enumerate(DTYPES)
    if j == i % 3 or (j < 2 and name in ("soft_cap_sinks_bias", "multi_query"))
]


@pytest.mark.slow
@pytest.mark.parametrize("generation, dtype, name", FEATURES)
def test_features_compile(generation, dtype, name):
    pattern, options, extras, heads, kv_heads = EVERYTHING[name]
    length = 1111  # No multiple of anything.

    def f(q, k, v, ids, bias, sink_logits):
        extra = {"key_bias": bias, "sink_logits": sink_logits} if extras else {}
        return attend(q, k, v, mask=pattern, segment_ids=ids, **options, **extra)

    compile_for(
        generation, gradients(f),
        *arrays(length, 96, dtype=dtype, heads=heads, kv_heads=kv_heads, batch=2),
        jax.ShapeDtypeStruct((2, length), jnp.int32),
        jax.ShapeDtypeStruct((2, heads, length), jnp.float32),
        jax.ShapeDtypeStruct((heads,), jnp.float32),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("positions", (False, True), ids=("bits", "positions"))
def test_arrays_as_masks_and_positions_compile(positions):
    length = 512
    array = np.random.default_rng(0).random((length, length)) < 0.1
    mask = local.Local(window=100) if positions else block_mask.from_array(array)
    at = jax.ShapeDtypeStruct((length,), jnp.int32)

    def f(q, k, v, at):
        return attend(q, k, v, mask=mask, positions=at if positions else None)

    compile_for("v5e", gradients(f), *arrays(length, 128), at)


def test_refuses_off_the_tpu():
    q, k, v = (jnp.zeros(x.shape, x.dtype) for x in arrays(128, 64))
    with pytest.raises(NotImplementedError, match="needs a TPU, the target is 'cpu'"):
        attend(q, k, v, mask=causal.Causal())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_static_cost_reads_the_schedule(tmp_path):
    """In a process of its own: the compiler reads where to write its schedule when it loads."""
    command = "-m experiments.kernels.tpu_cost --generations v5e --workloads causal --out"
    subprocess.run([sys.executable, *command.split(), str(tmp_path)], check=True, timeout=1200)
    for record in json.loads((tmp_path / "tpu_cost_v5e.json").read_text())["results"]:
        ours, splash = record["ours"], record["splash"]
        full, partial = ours["kernel"]["bodies"]
        assert 500 < full <= 1.2 * partial
        assert ours["steps"] == ours["full"] + ours["partial"]
        assert 0.5 * record["mxu_bound_cycles"] < ours["cycles"] <= splash["cycles"]
