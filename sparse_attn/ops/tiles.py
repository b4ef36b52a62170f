"""Hardware facts: which device is the target, and block sizes that suit it."""

import contextlib
import contextvars
import dataclasses

import jax

from sparse_attn.masks import programs


@dataclasses.dataclass(frozen=True)
class Target:
    """The device that kernels are chosen and sized for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: the device kind as JAX names it, e.g. "NVIDIA H200", "TPU v5 lite", "cpu".
      compute_capability: of an NVIDIA GPU, e.g. "9.0"; None elsewhere.
    """

    platform: str
    kind: str
    compute_capability: str | None = None


_assumed: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def target() -> Target:
    """The device that programs are built for: the default one, or what `assume` set.

    >>> with assume(Target("tpu", "TPU v5 lite")):
    ...     target().platform
    'tpu'
    """
    if (assumed := _assumed.get()) is not None:
        return assumed
    device = jax.devices()[0]
    return Target(
        platform=device.platform,
        kind=device.device_kind,
        compute_capability=getattr(device, "compute_capability", None),
    )


# For functions that ask for the target, or call what does: a program is made for one.
one_program = programs.one_program(target)


@contextlib.contextmanager
def assume(device: Target):
    """Builds for `device` though it is not attached: ahead-of-time compilation and dry runs."""
    token = _assumed.set(device)
    try:
        yield
    finally:
        _assumed.reset(token)


def mask_block(length: int) -> int:
    """Tokens per mask block for a sequence of `length` tokens, when the caller named none.

    128 is the matrix tile of every target; short sequences take the smallest power of two >= 16
    that holds them, so that they are not mostly padding.

    >>> [mask_block(n) for n in (1, 33, 128, 100_000)]
    [16, 64, 128, 128]
    """
    return min(128, max(16, power_of_two(length)))


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below `n >= 1`.

    >>> [power_of_two(n) for n in (1, 2, 3, 64, 65)]
    [1, 2, 4, 64, 128]
    """
    return 1 << (n - 1).bit_length()


def tpu_tiles(*, step: str, group: int, wide: bool) -> tuple[tuple[int, int], ...]:
    """Tiles (queries, keys) in tokens that the TPU kernels choose from, the largest first.

    From the compilers' schedules, experiments/kernels/results/tpu_cost.md: 512 keys keep the
    matrix units busy between two updates of the maximum, more rows of stacked heads than 2048
    gain nothing. The least is one tile of the matrix units.

    Args:
      step: "forward" or "backward".
      group: query heads stacked on one tile of keys.
      wide: head dimensions above 128, or float32: twice the vector memory per token.

    >>> tpu_tiles(step="forward", group=4, wide=False)
    ((512, 512), (256, 512), (128, 512), (128, 128))
    """
    rows = 1024 if wide else 2048
    heads = power_of_two(group)
    widest = 256 if wide else 512
    largest = max(128, min(256 if wide and step == "backward" else 512, rows // heads))
    # Many heads on the least queries: fewer keys keep the logits as small.
    tile_kv = max(128, min(widest, 512 * rows // (heads * largest)))
    sides = [side for side in (512, 256, 128) if side <= largest]
    return *((side, tile_kv) for side in sides), (128, 128)


@dataclasses.dataclass(frozen=True)
class TpuCycles:
    """Issue cycles of a TPU kernel: what a step, each of its parts and each of its pairs of 128
    queries (of one head) and 128 keys takes, 128 queries whatever their keys, and an output row.
    """

    step: int
    part: int
    pair: int
    queries: int
    row: int

    def __call__(
        self, steps: float | int, rows: float | int, tile: tuple[int, int], parts: int, group: int
    ):
        """Cycles of `steps` steps of `parts` tiles, in `rows` output rows.

        >>> TpuCycles(100, 10, 1, 2, 3)(1, 1, (128, 256), 4, 2)
        166.0
        """
        queries = group * tile[0] / 128
        inside = queries * (self.queries + self.pair * parts * tile[1] / 128)
        return float(steps * (self.step + self.part * parts + inside) + rows * self.row * queries)


# Fitted to the kernels in experiments/kernels/results/tpu_cost_*.json, by device kind.
_TPU_CYCLES = {
    "TPU v4": {
        "forward": TpuCycles(170, 50, 74, 98, 240), "backward": TpuCycles(350, 90, 150, 80, 48),
    },
    "TPU v5 lite": {
        "forward": TpuCycles(110, 45, 48, 67, 158), "backward": TpuCycles(240, 80, 136, 61, 33),
    },
    "TPU v5": {
        "forward": TpuCycles(180, 55, 48, 67, 158), "backward": TpuCycles(255, 100, 136, 61, 33),
    },
    "TPU v6 lite": {
        "forward": TpuCycles(120, 53, 31, 60, 78), "backward": TpuCycles(255, 97, 70, 72, 20),
    },
}  # fmt: skip


def tpu_cycles(step: str) -> TpuCycles:
    """Cycles of the "forward" or "backward" kernel on the target; unknown TPUs count as v6e."""
    return _TPU_CYCLES.get(target().kind, _TPU_CYCLES["TPU v6 lite"])[step]


def tpu_smem_words() -> int:
    """32-bit words of scalar memory that a list of steps may take: three quarters of 1 MiB."""
    return 192 * 1024


def tpu_vmem_bytes() -> int | None:
    """Bytes of vector memory that a kernel may take; None = the compiler's default (16 MiB).

    v4 has 16 MiB per core, v5p 64 MiB, v5e and v6e 128 MiB.
    """
    return None if target().kind in ("TPU v4", "TPU v3", "TPU v2") else 48 * 1024 * 1024
