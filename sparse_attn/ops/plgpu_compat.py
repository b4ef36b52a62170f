"""The one place that knows which JAX has Pallas Mosaic GPU as the kernels need it."""

import jax
from jax import lax
from jax._src import config  # The interpreter has no public "is it on?".

try:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError:  # No GPU support in this installation: `missing` says so.
    pl = plgpu = None

_OLDEST = (0, 11, 2)


def missing() -> str | None:
    """Why the kernels cannot even be traced with the installed JAX, or None when they can.

    >>> missing() is None or "jax" in missing()
    True
    """
    if plgpu is None or jax.__version_info__ < _OLDEST:
        return f"needs jax >= 0.11.2 (and so Python >= 3.12), this is jax {jax.__version__}"
    return None


def interpreted() -> bool:
    """True under `plgpu.force_gpu_interpret_mode`: kernels run on the CPU (slowly)."""
    return config.pallas_tpu_interpret_mode_context_manager.value is not None


def processors() -> int:
    """Programs to start: one per multiprocessor, so that each serves many rows in turn."""
    if interpreted():
        return 2  # So that the interpreter also sees programs that serve several rows.
    return getattr(jax.devices()[0], "core_count", None) or 132  # 132: of an H100 or H200.


def staging(shape: tuple[int, ...], dtype) -> tuple:
    """Scratch that `wgmma_from_registers` needs: none on a GPU."""
    return (plgpu.SMEM(shape, dtype),) if interpreted() else ()


def wgmma_from_registers(accumulator, a, b, staged) -> None:
    """`accumulator += a @ b` with `a` in registers, asynchronously.

    The interpreter (0.11.2, 0.12.0) takes only operands in shared memory, so there `a` goes
    through `staged`, a reference of its shape.
    """
    if staged is not None:
        staged[...] = a
        a = staged
    plgpu.wgmma(accumulator, a, b)


def multiply_add(start, a, b, staged, then=None):
    """`start + a @ b` in float32, awaited, with `start` and `a` in registers.

    The interpreter (0.11.2, 0.12.0) cannot store to an accumulator, so there the sum comes last.
    """

    def run(accumulator):
        if not interpreted():
            accumulator[...] = start
        wgmma_from_registers(accumulator, a, b, staged)
        if then is not None:
            then()
        return accumulator[...]

    product = pl.run_scoped(run, plgpu.ACC(start.shape, start.dtype))
    return start + product if interpreted() else product


def store_to_global(ref, value) -> None:
    """`ref[...] = value`, from registers to global memory."""
    if hasattr(plgpu, "store"):  # 0.12, where an assignment takes shared memory only.
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def element_rule(fn, *args):
    """`fn(*args)` for the rule of a mask, in operations that the kernels' compiler takes.

    In 0.11.2 and 0.12.0 `~` of booleans does not compile; exclusive or does.
    """
    closed = jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args))
    (result,) = _evaluate(closed.jaxpr, closed.consts, *args)
    return result


def _evaluate(jaxpr, consts, *args):
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args)))

    def read(var):
        return var.val if hasattr(var, "val") else values[var]

    for eqn in jaxpr.eqns:
        operands = [read(var) for var in eqn.invars]
        inner = eqn.params.get("jaxpr")
        if eqn.primitive is lax.not_p and operands[0].dtype == bool:
            results = [lax.bitwise_xor(operands[0], jax.numpy.ones_like(operands[0]))]
        elif inner is not None and hasattr(inner, "jaxpr"):
            results = _evaluate(inner.jaxpr, inner.consts, *operands)
        else:
            results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
            results = results if eqn.primitive.multiple_results else [results]
        values.update(zip(eqn.outvars, results))
    return [read(var) for var in jaxpr.outvars]
