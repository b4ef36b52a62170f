"""Lists of blocks on the accelerators' kernels, by their interpreters where there is no device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops.token_select import attend as select_lib
from tests.ops import contract, oracle


def _cells():
    for kernel in attend_lib.backends():
        env = contract.environment(kernel)
        if kernel in ("reference", "xla"):
            continue  # The contract of the op has run on these.
        marks = [pytest.mark.slow] if env.interpreted or env.reason else []
        if env.reason is not None:
            marks.append(pytest.mark.skip(reason=f"{kernel}: {env.reason}"))
        # Interpreters of Triton take minutes for the many tiles of this op.
        if kernel == "triton_gpu" and env.interpreted:
            marks.append(pytest.mark.skip(reason="triton_gpu: runs on an NVIDIA GPU"))
        yield pytest.param(kernel, id=kernel, marks=marks)


@pytest.mark.parametrize("kernel", list(_cells()))
def test_kernel_runs_the_lists(kernel):
    env = contract.environment(kernel)
    rng = np.random.default_rng(0)
    length, block = 150, max(64, env.block or 0)
    q, k, v, dout = (
        jnp.asarray(rng.standard_normal((1, length, n, env.head_dim)), env.dtype)
        for n in (4, 2, 2, 4)
    )
    dlse = jnp.asarray(rng.standard_normal(q.shape[:3]), jnp.float32)
    selected = rng.integers(-1, -(-length // block), (1, length, 2, 2)).astype(np.int32)

    @jax.jit
    def both(q, k, v):
        def f(q, k, v):
            return select_lib.attend(
                q, k, v, selected=jnp.asarray(selected), block=block, return_lse=True,
                impl="by_block", kernel=kernel,
            )  # fmt: skip

        results, pull = jax.vjp(f, q, k, v)
        return *results, *pull((dout, dlse))

    with env.enter():
        got = oracle.Results(*map(np.asarray, both(q, k, v)))
    at = np.arange(length)
    seen = (selected[..., None] == at // block).any(3).swapaxes(1, 2) & np.tri(length, dtype=bool)
    want = oracle.attention(
        *map(np.asarray, (q, k, v)), np.repeat(seen, 2, 1), np.asarray(dout), np.asarray(dlse),
        scale=env.head_dim**-0.5,
    )  # fmt: skip
    contract.compare(got, want, q.dtype, extra=0.0 if q.dtype == jnp.float32 else 0.02)
