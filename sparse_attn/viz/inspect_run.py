"""A finished run opened on any machine: where the heads of the trained model look."""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from sparse_attn.data import tokenizer
from sparse_attn.masks import block_mask, lower
from sparse_attn.models import attention as attention_lib
from sparse_attn.models import short_conv
from sparse_attn.ops import pooled
from sparse_attn.parallel import attention as parallel_lib
from sparse_attn.patterns import base, per_head
from sparse_attn.train import checkpoint, run_folder, tasks
from sparse_attn.viz import tables

_CHUNK = 1 << 22  # Logits computed at a time, 16 MB.
_BLOCKS = 32  # Blocks per side of a picture when no block size is given.
COLUMNS = (
    *("layer", "head", "pattern", "active blocks", "blocks with 90 % of the mass"),
    *("mass on the first block", "mean distance"),
)


@dataclasses.dataclass(frozen=True, eq=False)
class InspectedRun:
    """What `load_for_inspection` opened.

    Attributes:
      folder: of the run.
      config: the resolved config, nested dicts.
      summary: its `summary.json`; empty when the run is not finished.
      step: of the checkpoint.
      model: the Linen module, with the portable backend and a layer after the other.
      params: its parameters, on one local device.
    """

    folder: pathlib.Path
    config: dict[str, Any]
    summary: dict[str, Any]
    step: int
    model: nn.Module
    params: PyTree

    def attend_to(self, example: str | Any | None = None) -> "Attention":
        """Runs the model once and keeps queries and keys of every layer, O(tokens) memory.

        Args:
          example: text, token ids `[T]`, or an image as the model takes it (one example, no batch
            axis). None = the run's own sample. Text and tokens are cut to the context.

        Raises:
          ValueError: None for a run without a sample.
        """
        kept = _run(self.model, self.params, jnp.asarray(self._inputs(example))[None])
        config = self.model.config
        queries, keys = [], []
        for layer in range(config.num_layers):
            found = kept[f"block_{layer}"]["attention"]
            (positions,) = found["positions"]
            for name, rotated in (("query", queries), ("key", keys)):
                (x,) = found[name]["kept"]
                if config.short_conv is not None:
                    taps = self.params["layers"]["attention"][f"{name}_taps"][layer]
                    x = short_conv.short_conv(x, taps)
                if config.rope_base is not None:
                    x = attention_lib.rope(x, positions, base=config.rope_base)
                rotated.append(np.asarray(x[0].astype(jnp.float32)))
        sinks = self.params["layers"]["attention"].get("sink_logits")
        return Attention(
            queries=tuple(queries),
            keys=tuple(keys),
            patterns=config.layer_patterns(),
            soft_cap=config.attention_soft_cap,
            sink_logits=None if sinks is None else np.asarray(sinks, np.float32),
        )

    def _inputs(self, example):
        if example is None:
            path = self.folder / run_folder.SAMPLE
            if not path.exists():
                raise ValueError(f"example=None must be given: {self.folder} has no sample")
            example = path.read_text(errors="replace")
        if isinstance(example, str):
            example = np.append(np.int32(tokenizer.BOS), tokenizer.encode(example))
        if "context" in self.config["data"]:
            example = example[: self.config["data"]["context"]]
        return example


@functools.partial(jax.jit, static_argnames="model")
def _run(model, params, inputs):
    """Queries and keys of the layers as they leave their projections, and positions."""

    def keep(next_fun, args, kwargs, context):
        out, module = next_fun(*args, **kwargs), context.module
        if context.method_name == "__call__":
            if isinstance(module, attention_lib.SelfAttention):
                module.sow("intermediates", "positions", kwargs["positions"])
            elif module.name in ("query", "key"):
                module.sow("intermediates", "kept", out)
        return out

    with nn.intercept_methods(keep):
        _, kept = model.apply({"params": params}, inputs, mutable=["intermediates"])
    return kept["intermediates"]["layers"]


@dataclasses.dataclass(frozen=True, eq=False)
class Attention:
    """Queries and keys of one example, and what the heads make of them, a head at a time.

    Attributes:
      queries, keys: float32 `[T, N, H]` and `[T, K, H]` of each layer, rotated.
      patterns: of each layer.
      soft_cap: of the logits, or None.
      sink_logits: `[L, N]`, or None.
    """

    queries: tuple[Float[np.ndarray, "T N H"], ...]
    keys: tuple[Float[np.ndarray, "T K H"], ...]
    patterns: tuple[base.Expression, ...]
    soft_cap: float | None = None
    sink_logits: Float[Array, "L N"] | Float[np.ndarray, "L N"] | None = None

    def pattern(self, layer: int, head: int) -> base.Pattern:
        """What the head may see.

        Raises:
          NotImplementedError: a layer that chooses its keys at run time.
        """
        entry = self.patterns[layer]
        entry = entry.for_head(head) if isinstance(entry, per_head.PerHead) else entry
        if not isinstance(entry, base.Pattern):
            raise NotImplementedError(
                f"layer {layer} chooses its keys at run time: give pattern=, {entry!r} is none"
            )
        return entry

    def probabilities(
        self,
        layer: int,
        head: int,
        *,
        start: int = 0,
        stop: int | None = None,
        pattern: base.Pattern | None = None,
    ) -> Float[np.ndarray, "rows T"]:
        """Attention of the queries `[start, stop)` to all keys; rows sum to 1.

        A sink takes its part of a row. `pattern` takes the place of the head's own: what the same
        queries would look at.

        Raises:
          NotImplementedError: a head whose keys are averages of others, or chosen at run time.
        """
        pattern = self.pattern(layer, head) if pattern is None else pattern
        if pooled.is_pooled(pattern):
            raise NotImplementedError(f"{pattern!r} sees averages of keys, which are not kept")
        q, k = self.queries[layer], self.keys[layer]
        length, group = len(k), q.shape[1] // k.shape[1]
        at = np.arange(length, dtype=np.int32)
        logits = q[start:stop, head] @ k[:, head // group].T * q.shape[-1] ** -0.5
        if self.soft_cap is not None:
            logits = self.soft_cap * np.tanh(logits / self.soft_cap)
        logits = np.where(pattern.mask_fn(at[start:stop, None], at), logits, -np.inf)
        sink = -np.inf if self.sink_logits is None else self.sink_logits[layer, head]
        top = np.maximum(logits.max(-1, keepdims=True), sink)
        top = np.where(top == -np.inf, 0, top)  # A query that sees nothing attends to nothing.
        weights = np.exp(logits - top)
        total = weights.sum(-1, keepdims=True) + np.exp(sink - top)
        return weights / np.where(total == 0, 1, total)

    def block_mass(
        self, layer: int, head: int, *, block: int, pattern: base.Pattern | None = None
    ) -> Float[np.ndarray, "nq nk"]:
        """Mean attention of the queries of a block to all keys of a block; rows sum to 1.

        Arguments as in `probabilities`. Never holds a T x T array.
        """
        base.check_int("block", block)
        length = len(self.keys[layer])
        starts = np.arange(0, length, block)
        mass = np.zeros((len(starts), len(starts)), np.float32)
        for i, j, rows in self._pieces(layer, head, pattern, block):
            by_key = np.add.reduceat(rows, starts, axis=1)
            mass[i // block : -(-j // block)] = np.add.reduceat(
                by_key, np.arange(0, j - i, block), axis=0
            )
        return mass / np.diff(np.append(starts, length))[:, None]

    def share(self, layer: int, head: int, within: base.Pattern) -> float:
        """Share of the head's attention that falls on keys which `within` lets through.

        How much of what a trained head looks at would a sparser pattern keep?
        """
        length = len(self.keys[layer])
        at = np.arange(length, dtype=np.int32)
        kept = sum(
            float((rows * within.mask_fn(at[i:j, None], at)).sum())
            for i, j, rows in self._pieces(layer, head, None, 1)
        )
        return kept / length

    def table(self, *, block: int | None = None) -> str:
        """A line per layer and head: how its mass lies against the blocks of its pattern."""
        length = len(self.keys[0])
        block = self._block() if block is None else block
        at = np.arange(length)
        lines = []
        for layer in range(len(self.queries)):
            for head in range(self.queries[layer].shape[1]):
                pattern = self.pattern(layer, head)
                mass = self.block_mass(layer, head, block=block)
                descending = np.sort(mass.ravel())[::-1].cumsum()
                needed = int((descending < 0.9 * descending[-1]).sum()) + 1
                distance = sum(
                    float((rows * np.abs(at[i:j, None] - at)).sum())
                    for i, j, rows in self._pieces(layer, head, None, 1)
                )
                lines.append(
                    (
                        *(layer, head, pattern.expression(), self._active(pattern, block).sum()),
                        *(needed, f"{mass[:, 0].mean():.3f}", f"{distance / length:.1f}"),
                    )
                )
        return tables.text(COLUMNS, lines)

    def show(self, layer: int, *, block: int | None = None) -> "matplotlib.figure.Figure":
        """A panel per head: mass per block, darker is more; grey: hidden by the pattern."""
        from matplotlib import colors, pyplot  # slow to import, and only figures need it

        block = self._block() if block is None else block
        heads = self.queries[layer].shape[1]
        made, axes = pyplot.subplots(
            1, heads, figsize=(3.2 * heads, 3.6), squeeze=False, layout="constrained"
        )
        for head, axis in enumerate(axes[0]):
            pattern = self.pattern(layer, head)
            mass = self.block_mass(layer, head, block=block)
            hidden = np.where(self._active(pattern, block), np.nan, 0.25)
            norm = colors.PowerNorm(0.5, vmin=0, vmax=max(float(mass.max()), 1e-9))
            axis.imshow(mass, cmap="Blues", norm=norm, interpolation="nearest")
            axis.imshow(hidden, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(f"layer {layer}, head {head}\n{pattern.expression()}"[:80], fontsize=7)
            axis.set_xlabel(f"key block of {block}", fontsize=7)
            axis.tick_params(labelsize=6)
        axes[0, 0].set_ylabel(f"query block of {block}", fontsize=7)
        pyplot.close(made)  # The caller holds it: pyplot must neither draw it again nor keep it.
        return made

    def _block(self) -> int:
        return max(1, -(-len(self.keys[0]) // _BLOCKS))

    def _active(self, pattern, block):
        length = len(self.keys[0])
        mask = lower.lower(pattern, q_len=length, block_q=block, block_kv=block)
        return block_mask.block_states(mask) > 0

    def _pieces(self, layer, head, pattern, multiple):
        """(start, stop, probabilities) of some queries at a time, whole multiples of a number."""
        length = len(self.keys[layer])
        step = max(multiple, _CHUNK // length // multiple * multiple)
        for i in range(0, length, step):
            j = min(i + step, length)
            yield i, j, self.probabilities(layer, head, start=i, stop=j, pattern=pattern)


def load_for_inspection(folder: str | os.PathLike[str], *, step: int | None = None) -> InspectedRun:
    """Opens the checkpoint of a run on this machine, a CPU will do, whatever it was trained on.

    Reads the files of the run folder only: no data, no accelerator, no mesh.

    Args:
      folder: of the run, e.g. "runs/quickstart/0".
      step: of the checkpoint; None = the newest.

    Raises:
      FileNotFoundError: the folder has no `config.json`.
      CheckpointError: there is no such step, or it is damaged.

    >>> load_for_inspection("runs/none")
    Traceback (most recent call last):
    FileNotFoundError: runs/none must be a run folder: it has no config.json
    """
    folder = pathlib.Path(folder)
    config = run_folder.read_json(folder, run_folder.CONFIG)
    if config is None:
        raise FileNotFoundError(f"{folder} must be a run folder: it has no {run_folder.CONFIG}")
    restored = checkpoint.load(folder / run_folder.CHECKPOINTS, step=step)
    # Backend, mesh and layer loop are of the machine that trained; the parameters know of none.
    model = tasks.of({**config, "model": {**config["model"], "impl": None}}).model
    portable = dataclasses.replace(
        model.config, layer_loop="unroll", remat="none", tokens=parallel_lib.Tokens()
    )
    return InspectedRun(
        folder=folder,
        config=config,
        summary=run_folder.read_json(folder, run_folder.SUMMARY) or {},
        step=restored.step,
        model=type(model)(portable),
        params=restored.state["params"],
    )
