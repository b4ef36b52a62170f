"""Training speed of decoders at 32k tokens on NVIDIA GPUs: dense cuDNN beside a sparse window.

    python -m experiments.throughput.study --devices=1
    python -m experiments.throughput.study --devices=2
    python -m experiments.throughput.study --devices=2 --tiny    # anywhere, in a minute
    python -m experiments.throughput.study --table               # the README, from results/*.json

One device: dense causal attention by cuDNN against a window with sinks on our kernel, whole
training steps. Two devices: the tokens of a row on both, by ring and by Ulysses, against one; the
losses and the gradients must agree. README.md tells how to read the numbers.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

# Activations of 32k tokens need most of the memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
if "--tiny" in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"
    forced = "--xla_force_host_platform_device_count=2"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {forced}"

import jax
import numpy as np

from experiments.kernels import bench
from sparse_attn import patterns
from sparse_attn.data import tokenizer
from sparse_attn.masks import lower
from sparse_attn.models import sizes, transformer
from sparse_attn.parallel import attention as parallel_lib
from sparse_attn.parallel import balance, split
from sparse_attn.parallel import mesh as mesh_lib
from sparse_attn.train import flops, optim
from sparse_attn.train import state as state_lib

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
MARKS = ("<!-- results -->", "<!-- end of results -->")
DENSE, WINDOW = "causal()", "local(window=1024) | sinks(tokens=64)"
WARMUP, STEPS = 3, 12
# Without a warm-up 1e-4 makes a spike of the loss in the seventh step (on every backend), where
# rounding decides what the loss is; losses of two runs can be compared without it only.
LEARNING_RATE = 1e-5
# What two devices may differ by: relative differences of a loss, and of a gradient in the Frobenius
# norm, the largest over the parameters. bfloat16 rounds to 2^-9 (0.002), and differently where the
# keys come in other pieces.
LOSS_TOLERANCE, GRAD_TOLERANCE = 1e-3, 5e-2
TINY_TOLERANCE = 1e-4  # float32


@dataclasses.dataclass(frozen=True)
class Case:
    """One training step.

    Attributes:
      size: of `models.sizes`.
      pattern: an expression, of all layers.
      impl: backend of `attend`, or "cudnn" for JAX's dense attention by cuDNN.
      scheme: "" for one device, or `scheme[:order]` of two, as `config.mesh.sequence`.
      remat: as `TransformerConfig`.
    """

    size: str
    pattern: str
    impl: str
    scheme: str = ""
    remat: str = "none"

    @property
    def name(self) -> str:
        """Of the row in the table."""
        return f"{self.size}, {self.pattern}, {self.impl}{self.scheme and ', ' + self.scheme}"


@dataclasses.dataclass(frozen=True)
class Scale:
    """What differs between the real study and the tiny one."""

    context: int
    dtype: str
    model: Callable[[str], dict[str, int]]
    window: str
    impl: str


REAL = Scale(32768, "bfloat16", sizes.decoder, WINDOW, "pallas_gpu")
TINY = Scale(
    256, "float32",
    lambda size: dict(num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=2, head_dim=16),
    "local(window=64) | sinks(tokens=4)", "xla",
)  # fmt: skip


def cases(devices: int, scale: Scale) -> list[Case]:
    """The steps of the study. Where activations fit into 80 GB all are kept."""
    if devices == 1:
        return [
            Case(size, pattern, impl, remat=remat)
            for size, remat in (("125m", "none"), ("350m", "dots"))
            for pattern, impl in ((DENSE, "cudnn"), (scale.window, scale.impl))
        ]
    return [
        Case("125m", pattern, scale.impl, scheme)
        for pattern, ring in ((scale.window, "ring"), (DENSE, "ring:zigzag"))
        for scheme in ("", ring, "ulysses")
    ]


def dense_attend(q, k, v, *, mask, impl, **others):
    """JAX's dense causal attention in place of `parallel.attention.attend`."""
    assert mask == patterns.parse(DENSE), mask
    assert not any(others[name] is not None for name in others if name != "tokens"), others
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)


class Step:
    """A case, compiled: its step, state and batch."""

    def __init__(self, case: Case, scale: Scale):
        self.case, self._length = case, scale.context
        self._mesh = mesh_lib.make("seq=2", devices=jax.devices()[:2]) if case.scheme else None
        config = transformer.TransformerConfig(
            vocab_size=tokenizer.VOCAB_SIZE,
            pattern=patterns.parse(case.pattern),
            impl=None if case.impl == "cudnn" else case.impl,
            dtype=scale.dtype,
            remat=case.remat,
            tokens=self._tokens(),
            **scale.model(case.size),
        )
        self.config, model, optimizer = (
            config,
            transformer.Transformer(config),
            optim.adamw(LEARNING_RATE),
        )
        # Initial values do not depend on attention: one token, on a backend that takes anything.
        plain = dataclasses.replace(
            config, pattern=patterns.parse(DENSE), impl="xla", tokens=parallel_lib.Tokens()
        )
        self._create = functools.partial(
            state_lib.create, transformer.Transformer(plain), optimizer,
            key=jax.random.key(0), length=1,
        )  # fmt: skip
        start = time.perf_counter()
        with self._in_use():
            shapes = jax.eval_shape(self._create)
            self.shardings = self._shardings(shapes)
            self._batch = self._random_batch()
            step = state_lib.make_train_step(model, optimizer, shardings=self.shardings)
            if self.shardings is not None:
                shapes = jax.tree.map(
                    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                    shapes,
                    self.shardings,
                )
            self._lowered = step.lower(shapes, self._batch)
        self.lower_s = time.perf_counter() - start

    def _tokens(self) -> parallel_lib.Tokens:
        scheme, _, order = self.case.scheme.partition(":")
        if not scheme:
            return parallel_lib.Tokens()
        block = split.block_of(self._length, chunks=2)
        pattern = patterns.parse(self.case.pattern)
        mask = lower.lower(pattern, q_len=self._length, block_q=block, block_kv=block)
        return parallel_lib.Tokens(scheme, balance.order(order or "text", [mask], ranks=2))

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._mesh is not None:
                stack.enter_context(jax.set_mesh(self._mesh))
            if self.case.impl == "cudnn":
                stack.enter_context(mock.patch.object(parallel_lib, "attend", dense_attend))
            yield

    def _shardings(self, shapes):
        return None if self._mesh is None else mesh_lib.shardings(self._mesh, shapes)

    def _random_batch(self) -> dict[str, Any]:
        """One row of random bytes and the same byte to come after each: the same for every case."""
        rng = np.random.default_rng(0)
        row = rng.integers(0, tokenizer.BYTES, (1, self._length + 1), np.int32)
        batch = {"inputs": row[:, :-1], "targets": row[:, 1:]}
        batch["weights"] = np.ones(batch["inputs"].shape, np.float32)
        if self._mesh is None:
            return jax.device_put(batch)
        rows = mesh_lib.Batches(
            self._mesh,
            batch_size=1,
            length=self._length,
            places=self.config.tokens.places(self._length),
        )
        return rows.place(batch)

    def compile(self) -> None:
        """May run in a thread beside others."""
        start = time.perf_counter()
        self._compiled = self._lowered.compile()
        self.compile_s = time.perf_counter() - start

    def measure(self) -> dict[str, Any]:
        """Runs the step; the row of the table, and the gradients (host arrays) of the first one."""
        with self._in_use():
            shardings = None if self.shardings is None else self._shardings
            state = self._create(shardings=shardings)
        losses, norms, seconds, grads = [], [], [], None
        for i in range(WARMUP + STEPS):
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(self._compiled(state, self._batch))
            seconds.append(time.perf_counter() - start)
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
            if not i:  # Adam's first moment is then the clipped gradient, but for one factor.
                grads = jax.device_get(_first_moment(state.opt_state))
        params, step_s = state.params, statistics.median(seconds[WARMUP:])
        devices = 1 if self._mesh is None else self._mesh.size
        used = flops.utilization(
            self.config, params, context=self._length, batch_size=1,
            device_kind=jax.devices()[0].device_kind, num_devices=devices,
        )  # fmt: skip
        memory = self._compiled.memory_analysis()
        row = {
            **dataclasses.asdict(self.case), "devices": devices, "context": self._length,
            "params": state_lib.num_params(params),
            "step_ms": 1e3 * step_s, "tokens_per_s": self._length / step_s,
            "step_ms_all": [1e3 * s for s in seconds[WARMUP:]],
            "mfu_useful": None, "mfu_executed": None,
            **flops.attention_cost(self.config, context=self._length, batch_size=1),
            "losses": losses, "grad_norms": norms,
            "temp_gib": memory.temp_size_in_bytes / 2**30,
            "lower_s": self.lower_s, "compile_s": self.compile_s,
        }  # fmt: skip
        if used is not None:
            row["mfu_useful"] = used.useful_per_token * self._length / step_s / used.peak
            row["mfu_executed"] = used.executed_per_step / step_s / used.peak
        return row | {"grads": grads}


def _first_moment(opt_state):
    parts = jax.tree.leaves(opt_state, is_leaf=lambda x: hasattr(x, "mu"))
    return next(x.mu for x in parts if hasattr(x, "mu"))


def difference(a: Any, b: Any) -> float:
    """The largest relative difference of two trees' arrays, in the Frobenius norm.

    >>> difference({"x": np.array([3.0, 4.0])}, {"x": np.array([3.0, 4.5])})
    0.09...
    """
    norm = np.linalg.norm
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    # Of NumPy, as a number that is not one must not be lost.
    return float(np.max([norm(np.subtract(x, y)) / max(norm(y), 1e-30) for x, y in pairs]))


def compare(rows: list[dict[str, Any]], *, tiny: bool) -> list[str]:
    """Adds how each step on two devices agrees with that on one; what does not."""
    alone, wrong = {row["pattern"]: row for row in rows if not row["scheme"]}, []
    for row in rows:
        base = alone[row["pattern"]]
        if "error" in row or "error" in base or not row["scheme"]:
            continue
        row["loss_difference"] = difference(row["losses"], base["losses"])
        row["grad_difference"] = difference(row["grads"], base["grads"])
        row["speedup"] = base["step_ms"] / row["step_ms"]
        row["loss_tolerance"] = TINY_TOLERANCE if tiny else LOSS_TOLERANCE
        row["grad_tolerance"] = TINY_TOLERANCE if tiny else GRAD_TOLERANCE
        for name in ("loss", "grad"):
            found, allowed = row[f"{name}_difference"], row[f"{name}_tolerance"]
            if not found <= allowed:
                wrong.append(
                    f"{row['pattern']}, {row['scheme']}: {name} differs by {found:.2g}, "
                    f"allowed {allowed:g}"
                )
    return wrong


def run(devices: int, scale: Scale) -> list[dict[str, Any]]:
    """A row per case; a case that fails has its `error` instead of numbers."""
    chosen = cases(devices, scale)
    steps = [_guarded(lambda case=case: Step(case, scale)) for case in chosen]
    with concurrent.futures.ThreadPoolExecutor(len(steps)) as pool:
        compiled = list(pool.map(lambda s: s if isinstance(s, str) else _guarded(s.compile), steps))
    rows = []
    for case, step, failed in zip(chosen, steps, compiled, strict=True):
        row = failed or _guarded(step.measure)
        if isinstance(row, str):
            row = dataclasses.asdict(case) | {"error": row}
        told = row.get("error") or "{step_ms:.1f} ms, compiled in {compile_s:.1f} s".format(**row)
        print(f"{case.name}: {told}", flush=True)
        rows.append(row)
    return rows


def _guarded(fn: Callable[[], Any]) -> Any:
    try:
        return fn()
    except Exception as error:  # One case must not lose the others.
        return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line per case."""

    def percent(x):
        return "" if x is None else f"{100 * x:.1f} %"

    lines = []
    for row in rows:
        line = {
            "model": row["size"], "attention": f"`{row['pattern']}`".replace("|", "\\|"),
            "backend": row["impl"], "remat": row["remat"], "tokens over": row["scheme"] or "1 GPU",
        }  # fmt: skip
        if "error" in row:
            lines.append(line | {"step, ms": row["error"][:60]})
            continue
        line |= {
            "step, ms": f"{row['step_ms']:.1f}", "tokens/s": f"{row['tokens_per_s']:,.0f}",
            "MFU useful": percent(row["mfu_useful"]), "MFU executed": percent(row["mfu_executed"]),
        }  # fmt: skip
        if "speedup" in row:
            line |= {
                "against 1 GPU": f"{row['speedup']:.2f} x",
                "loss differs by": f"{row['loss_difference']:.1e}",
                "gradient differs by": f"{row['grad_difference']:.1e}",
            }
        lines.append(line)
    names = list(dict.fromkeys(name for line in lines for name in line))
    return bench.table([{name: line.get(name, "") for name in names} for line in lines])


def write_readme(readme: pathlib.Path, results: pathlib.Path) -> None:
    """Puts the tables of all results files between the marks."""
    parts = []
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text())
        found = content["environment"]
        versions = ", ".join(f"{k} {v}" for k, v in found["packages"].items())
        parts.append(
            f"{found['device']} ([results/{path.name}](results/{path.name}), {versions}):\n\n"
            f"{table(content['results'])}"
        )
    before, _, rest = readme.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    body = "\n\n".join(parts) or "Not measured yet."
    readme.write_text(f"{before}{MARKS[0]}\n\n{body}\n\n{MARKS[1]}{after}")


def file_name(kind: str, devices: int) -> str:
    """Of a results file.

    >>> file_name("NVIDIA H100 80GB HBM3", 2)
    'nvidia_h100_80gb_hbm3_x2.json'
    """
    return f"{bench.file_stem(kind)}_x{devices}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, choices=(1, 2), default=1)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on simulated devices")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--table", action="store_true", help="writes the README and stops")
    options = parser.parse_args()
    if options.table:
        write_readme(HERE / "README.md", RESULTS)
        return 0
    started = time.perf_counter()
    rows = run(options.devices, TINY if options.tiny else REAL)
    wrong = compare(rows, tiny=options.tiny) if options.devices > 1 else []
    wrong += [f"{row['pattern']}: {row['error']}" for row in rows if "error" in row]
    impossible = [r for r in rows if max(r.get("mfu_executed") or 0, r.get("mfu_useful") or 0) > 1]
    wrong += [f"{row['pattern']}: more than the peak, which is a bug" for row in impossible]
    for row in rows:
        row.pop("grads", None)
    if options.tiny and options.out == RESULTS:
        print("tiny: no results are written")
    else:
        kind = jax.devices()[0].device_kind
        print(bench.write(rows, options.out / file_name(kind, options.devices)))
    if options.out == RESULTS and not options.tiny:
        write_readme(HERE / "README.md", RESULTS)
    print(table(rows))
    for line in wrong:
        print(f"NOT accepted: {line}")
    print(f"{time.perf_counter() - started:.0f} s in all")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
