"""The reader of compiled programs, against programs whose numbers are known."""

import jax
import jax.numpy as jnp
import pytest

from sparse_attn.launch import hlo

# What the TPU compiler writes: a loop by its condition alone, a reduce-scatter as a fusion of that
# name, an asynchronous collective in several fusions of one chain, tuples of operands.
TPU = """HloModule step, is_scheduled=true

cond.1 (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5), backend_config={"flag_configs":[]}
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%all-reduce-scatter.1.clone (input: bf16[64]) -> bf16[32] {
  %input = bf16[64]{0} parameter(0)
  %all-reduce.1 = bf16[64]{0:T(8,128)(2,1)S(1)} all-reduce(%input), replica_groups={{0,1}}
  ROOT %slice = bf16[32]{0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={32}
}

%async.1 (a: bf16[16]) -> bf16[32] {
  %all-gather.1 = bf16[32]{0} all-gather(%a), dimensions={0}, frontend_attributes={chain_id="7"}
}

%async.2 (a: bf16[16]) -> bf16[32] {
  %all-gather.2 = bf16[32]{0} all-gather(%a), dimensions={0}, frontend_attributes={chain_id="7"}
}

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f.1 = bf16[32]{0} fusion(%x), kind=kCustom, calls=%async.1
  %f.2 = bf16[32]{0} fusion(%x), kind=kCustom, calls=%async.2
  %f.3 = bf16[32]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1.clone
  %cp = (f32[8]{0}, f32[8]{0}, u32[]{:S(2)}) collective-permute-start(%y), channel_id=1
  %cpd = f32[8]{0} collective-permute-done(%cp)
}

ENTRY %main.2 (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  %ar = (f32[]{:T(128)}, /*index=1*/f32[2,3]{1,0}) all-reduce(%a, %b), to_apply=%add
  %alone = f32[9]{0} all-reduce(%a), replica_groups=mesh['a'=2,'b'=1] {'b'}, to_apply=%add
  %rs = f32[4]{0} reduce-scatter(%z), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %big = f32[5,100]{1,0} broadcast(%c), dimensions={}
  %w = (s32[], f32[8], f32[5,100], f32[5,100]) while(%t), condition=%cond.1, body=%body.1
}
"""


def test_collectives_count_every_turn_of_a_loop_once():
    assert hlo.Program(TPU).collectives() == {
        "all-gather": {"count": 5, "bytes": 5 * 64},
        "all-reduce": {"count": 1, "bytes": 4 + 24},
        "collective-permute": {"count": 5, "bytes": 5 * 32},
        "reduce-scatter": {"count": 1 + 5, "bytes": 4 * 16 + 5 * 128},
    }


def test_largest_buffers_are_those_in_memory():
    first, second = hlo.Program(TPU).largest_buffers(2)
    assert (first["shape"], first["bytes"], first["copies"]) == ("f32[5,100]", 2000, 2)
    assert second["bytes"] < 100  # bf16[64] inside of a fusion is not in memory.


@pytest.mark.parametrize(
    ("shape", "size"),
    [("pred[3]", 3), ("s4[3]", 1), ("f8e4m3fn[2]", 2), ("c64[2]{0}", 16), ("token[]", 0)],
)
def test_shape_bytes(shape, size):
    assert hlo.shape_bytes(shape) == size


def test_a_program_of_this_jax():
    def body(x, _):
        return jnp.sin(x) @ x, None

    compiled = jax.jit(lambda x: jax.lax.scan(body, x, length=7)[0]).lower(jnp.ones((64, 64)))
    program = hlo.Program(compiled.compile().as_text())
    assert 7 in program.runs.values()
    assert program.collectives() == {}
    assert program.largest_buffers(1)[0]["shape"] == "f32[64,64]"
