"""Hardware facts: which device is the target, and block sizes that suit it."""

import contextlib
import contextvars
import dataclasses

import jax


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
    return min(128, max(16, 1 << (length - 1).bit_length()))


def tpu_tiles(*, by: str, group: int, wide: bool) -> tuple[tuple[int, int], ...]:
    """Tiles (queries, keys) in tokens that the TPU kernels choose from, the largest first.

    From the compiler's schedules for v5e, experiments/kernels/results/tpu_cost.json: about 1024
    rows of stacked heads fill the matrix units in the forward kernel; the backward kernel works
    head by head.

    Args:
      by: "rows" (forward) or "cols" (backward).
      group: query heads stacked on one tile of keys.
      wide: head dimensions above 128, or float32: twice the vector memory per token.

    >>> tpu_tiles(by="rows", group=4, wide=False)
    ((256, 512), (128, 512), (128, 128))
    """
    rows = 512 if wide else 1024
    if by == "cols":
        rows *= 2
    heads = 1 << (group - 1).bit_length()
    tile_q = max(128, min(256 if wide and by == "cols" else 512, rows // heads))
    # Many heads on the least queries: fewer keys keep the logits as small.
    tile_kv = max(128, min(256 if wide else 512, 512 * rows // (heads * tile_q)))
    return tuple(dict.fromkeys(((tile_q, tile_kv), (128, tile_kv), (128, 128))))


def tpu_tile_cost(tile_q: int, tile_kv: int, *, by: str, group: int) -> float:
    """Issue cycles of one step on v5e, fitted to experiments/kernels/results/tpu_cost.json.

    >>> tpu_tile_cost(256, 512, by="rows", group=4)
    2562.0
    """
    pairs = group * tile_q * tile_kv / 128**2
    return 450.0 + 66 * pairs if by == "rows" else 880.0 + 140 * pairs


def tpu_smem_words() -> int:
    """32-bit words of scalar memory that a list of steps may take: three quarters of 1 MiB."""
    return 192 * 1024


def tpu_vmem_bytes() -> int | None:
    """Bytes of vector memory that a kernel may take; None = the compiler's default (16 MiB).

    v4 has 16 MiB per core, v5p 64 MiB, v5e and v6e 128 MiB.
    """
    return None if target().kind in ("TPU v4", "TPU v3", "TPU v2") else 48 * 1024 * 1024
