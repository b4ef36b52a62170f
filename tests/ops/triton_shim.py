"""A stand-in for the module `jax_triton` that runs Triton kernels in Triton's CPU interpreter.

Triton reads `TRITON_INTERPRET` when a kernel is defined: conftest.py sets it. The interpreter asks
its arguments for the tensor protocol of torch; `_Tensor` is that protocol over a NumPy array. It
computes bfloat16 wrongly (as uint16), so such arrays go in as float32 and come back rounded.
"""

import contextlib
import sys
import threading

import jax
import ml_dtypes
import numpy as np

from sparse_attn.ops import tiles

# XLA runs callbacks side by side; the interpreter replaces functions of `triton` while it runs.
_ONE_AT_A_TIME = threading.Lock()


class _Tensor:
    """A NumPy array with the methods of a CPU tensor that Triton's interpreter calls."""

    def __init__(self, array):
        self.array = array
        self.dtype = f"torch.{array.dtype}"

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self  # Already on the host: the kernel writes in place.

    def new_empty(self, *_, **__):
        return _Tensor(self.array)

    def set_(self, storage, *_):
        self.array = storage.array

    def copy_(self, _):
        pass

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides


def triton_call(*args, kernel, out_shape, grid, num_warps, num_stages, **constants):
    """`jax_triton.triton_call`, interpreted; outputs start as garbage, so every element counts."""
    assert num_warps in (1, 2, 4, 8)
    assert num_stages >= 1
    arrays = [x for x in args if not isinstance(x, int)]
    scalars = {at: x for at, x in enumerate(args) if isinstance(x, int)}

    def run(*arrays):
        operands = [_Tensor(_contiguous(x)) for x in arrays]
        for at, x in sorted(scalars.items()):
            operands.insert(at, x)
        outputs = [np.empty(s.shape, _interpreted(s.dtype)) for s in out_shape]
        for x in outputs:
            x.view(np.uint8)[...] = 255  # nan, or -1
        with _ONE_AT_A_TIME:
            kernel[grid](*operands, *map(_Tensor, outputs), **constants)
        return tuple(x.astype(s.dtype) for x, s in zip(outputs, out_shape, strict=True))

    return jax.pure_callback(run, tuple(out_shape), *arrays)


def _interpreted(dtype):
    return np.dtype(np.float32 if dtype == ml_dtypes.bfloat16 else dtype)


def _contiguous(x):
    x = np.asarray(x)
    return np.ascontiguousarray(x, _interpreted(x.dtype))


@contextlib.contextmanager
def environment(kind="NVIDIA A100", compute_capability="8.0"):
    """Makes `triton_gpu` believe in a GPU and in jax_triton, and runs it in the interpreter."""
    before = sys.modules.get("jax_triton")
    sys.modules["jax_triton"] = sys.modules[__name__]
    try:
        with tiles.assume(tiles.Target("gpu", kind, compute_capability)):
            yield
    finally:
        if before is None:
            del sys.modules["jax_triton"]
        else:
            sys.modules["jax_triton"] = before
