r"""Trains one model from a config, into a run folder; started again, goes on where it stopped.

    python -m sparse_attn.train.main --config=configs/quickstart.py:local \
        --config.optim.lr=3e-4 --workdir=runs/local

Exit codes: 0 finished; 2 command line, config or data wrong; 65 the folder's checkpoints cannot be
restored; 70 the loss became NaN or infinite; 75 stopped by SIGTERM after saving, start again; 143
stopped at once by a second SIGTERM. `sparse_attn.train.exits` names them.

The prepared text is shared by all runs, in `$SPARSE_ATTN_CACHE` or `~/.cache/sparse_attn`.
"""

import glob
import itertools
import logging
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from sparse_attn import patterns
from sparse_attn.data import corpus as corpus_lib
from sparse_attn.data import prepare, text, tokenizer
from sparse_attn.masks import stats
from sparse_attn.models import transformer
from sparse_attn.ops import tiles
from sparse_attn.patterns import per_layer
from sparse_attn.train import checkpoint as checkpoint_lib
from sparse_attn.train import config_check, exits, run_folder, signals
from sparse_attn.train import evaluate as evaluate_lib
from sparse_attn.train import generate as generate_lib
from sparse_attn.train import loop as loop_lib
from sparse_attn.train import metrics as metrics_lib
from sparse_attn.train import optim as optim_lib
from sparse_attn.train import state as state_lib


class UsageError(Exception):
    """Config or data cannot be used as they are; the message says what to change."""


def train(config: Any, workdir: str | os.PathLike[str]) -> exits.ExitCode:
    """Runs a config (a `ConfigDict` or nested dicts) to its end, or until SIGTERM.

    Raises:
      UsageError: the config or the data is wrong; nothing was written.
      CheckpointError: the folder has checkpoints and none can be restored.
    """
    with signals.StopRequest() as stop:
        run = prepare_run(config, workdir)
        return exits.ExitCode.FINISHED if run is None else run.to_end(stop)


def prepare_run(config: Any, workdir: str | os.PathLike[str]) -> "Run | None":
    """Builds everything a run needs, None when the folder's run is finished already.

    Raises:
      UsageError: the config or the data is wrong; nothing was written.
    """
    config, folder = _plain(config), pathlib.Path(workdir)
    try:
        if run_folder.is_finished(folder, config["train"]["steps"]):
            print(f"{folder}: already finished ({config['train']['steps']} steps)")
            return None
        return Run(config, folder)
    except (ValueError, FileNotFoundError, NotImplementedError) as error:
        raise UsageError(str(error)) from error


class Run:
    """One start of a run: built from the config, restored from the folder, trained, summed up."""

    def __init__(self, config: dict[str, Any], folder: pathlib.Path):
        self.config, self.folder, self.ledger = config, folder, loop_lib.Ledger()
        # Everything that can be wrong is found before anything is written.
        self.model = build_model(config["model"], vocab_size=tokenizer.VOCAB_SIZE)
        optim = config["optim"]
        self.schedule = optim_lib.warmup_cosine(
            peak=optim["lr"], warmup_steps=optim["warmup_steps"], steps=config["train"]["steps"]
        )
        self.optimizer = optim_lib.adamw(
            self.schedule,
            b1=optim["b1"],
            b2=optim["b2"],
            weight_decay=optim["weight_decay"],
            clip_norm=optim["clip_norm"],
        )
        with self.ledger.timed("init"):
            self.state = state_lib.create(
                self.model,
                self.optimizer,
                key=jax.random.key(config["seed"]),
                length=config["data"]["context"],
            )
        with self.ledger.timed("prepare data"):
            self._open_data()
        self._write_identity()

    def _open_data(self) -> None:
        data = self.config["data"]
        self.corpus = corpus_lib.resolve(
            data["path"], prepared_dir=data["prepared_dir"], max_bytes=data["max_bytes"]
        )
        print(self.corpus.describe(), flush=True)
        cache = os.environ.get("SPARSE_ATTN_CACHE") or pathlib.Path.home() / ".cache/sparse_attn"
        prepared = prepare.prepare(self.corpus, cache)

        shape = {"context": data["context"], "batch_size": data["batch_size"]}
        self.train_batches = text.loader(prepared, split="train", seed=self.config["seed"], **shape)
        # The same windows at every evaluation, whatever the seed; kept, as they are few.
        batches = text.loader(prepared, split="validation", seed=0, repeat=False, **shape)
        self.eval_batches = list(itertools.islice(batches, self.config["train"]["eval_batches"]))

    def _write_identity(self) -> None:
        known = run_folder.read_json(self.folder, run_folder.CORPUS)
        if known is not None and known["sha256"] != self.corpus.sha256:
            raise ValueError(
                f"data changed: {self.folder} was trained on {known['name']} (sha256 "
                f"{known['sha256']}) and the text is now {self.corpus.name} (sha256 "
                f"{self.corpus.sha256}); start in another workdir"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        before = run_folder.read_json(self.folder, run_folder.CONFIG)
        changed = run_folder.changed_names(before, self.config) if before is not None else []
        if changed:
            print(f"config changed since the last start: {', '.join(changed)}", flush=True)
        run_folder.write_json(self.folder, run_folder.CONFIG, self.config)
        run_folder.write_json(self.folder, run_folder.ENV, run_folder.environment())
        run_folder.write_json(self.folder, run_folder.CORPUS, self.corpus.to_json())

    def to_end(self, stop: signals.StopRequest) -> exits.ExitCode:
        """Trains until the last step, a stop or a number that is not finite."""
        config = self.config
        checkpoints = checkpoint_lib.Checkpoints(
            self.folder / run_folder.CHECKPOINTS, keep=config["train"]["keep"]
        )
        with checkpoints:
            state, ledger = self._restore(checkpoints)
            step = int(state.step)
            board = metrics_lib.TensorBoard(self.folder / "tensorboard")
            lines = metrics_lib.JsonLines(self.folder / run_folder.METRICS, keep_until=step)
            progress = metrics_lib.Progress(config["train"]["steps"], name=config["name"])

            def write(step: int, values: dict[str, float]) -> None:
                lines.write(step, values)
                board.write(step, values)

            try:
                outcome = self._fit(state, checkpoints, ledger, write, progress, stop)
            except loop_lib.NonFiniteError as error:
                run_folder.write_json(self.folder, run_folder.NON_FINITE, error.report)
                print(
                    f"error: {error}; see {self.folder / run_folder.NON_FINITE}; checkpoints kept: "
                    f"steps {checkpoints.steps()}",
                    file=sys.stderr,
                )
                return exits.ExitCode.NON_FINITE
            finally:
                progress.close()
                lines.close()
                board.close()
        if not outcome.finished:
            print(f"stopped by SIGTERM after step {int(outcome.state.step)}; start again to go on")
            return exits.ExitCode.PREEMPTED
        self._sum_up(outcome, ledger)
        return exits.ExitCode.FINISHED

    def _restore(self, checkpoints):
        with self.ledger.timed("restore"):
            restored = checkpoints.restore(self.state)
        if restored is None:
            return self.state, self.ledger
        try:
            self.train_batches.set_state(restored.data_state)
        except ValueError as error:
            raise checkpoint_lib.CheckpointError(
                f"{self.folder} cannot go on from step {restored.step}: {error}"
            ) from error
        print(f"resumed from step {restored.step}", flush=True)
        ledger = loop_lib.Ledger(**restored.extra["ledger"])
        ledger.starts += 1
        for activity, spent in self.ledger.seconds.items():
            ledger.add(activity, spent)
        return restored.state, ledger

    def _fit(self, state, checkpoints, ledger, write, progress, stop) -> loop_lib.Outcome:
        settings = self.config["train"]
        eval_step = evaluate_lib.make_eval_step(self.model)
        return loop_lib.fit(
            state,
            state_lib.make_train_step(
                self.model,
                self.optimizer,
                grad_accum=self.config["optim"]["grad_accum"],
                schedule=self.schedule,
            ),
            self.train_batches,
            steps=settings["steps"],
            log_every=settings["log_every"],
            write=write,
            progress=progress,
            evaluate=lambda params: evaluate_lib.evaluate(eval_step, params, self.eval_batches),
            eval_every=settings["eval_every"],
            checkpoints=checkpoints,
            checkpoint_every=settings["checkpoint_every"],
            ledger=ledger,
            stop=lambda: stop.requested,
        )

    def _sum_up(self, outcome: loop_lib.Outcome, ledger: loop_lib.Ledger) -> None:
        with ledger.timed("sample"):
            sample = self._sample(outcome.state)
        metrics_lib.replace_file(self.folder / run_folder.SAMPLE, sample)
        history = metrics_lib.read_json_lines(self.folder / run_folder.METRICS)
        summary = {
            "finished": True,
            "name": self.config["name"],
            "pattern": self.model.config.pattern.expression(),
            "params": state_lib.num_params(outcome.state.params),
            "steps": int(outcome.state.step),
            "tokens": ledger.tokens,
            "val_bpb": _last(history, "eval/bits_per_byte"),
            "train_loss": _last(history, "train/loss"),
            "tokens_per_s": outcome.tokens_per_s or _last(history, "perf/tokens_per_s"),
            **attention_cost(
                self.model.config,
                context=self.config["data"]["context"],
                batch_size=self.config["data"]["batch_size"],
            ),
            "corpus": self.corpus.name,
            "corpus_sha256": self.corpus.sha256,
            "wall_seconds": sum(ledger.seconds.values()),
            "seconds": ledger.seconds,
            "starts": ledger.starts,
        }
        run_folder.write_json(self.folder, run_folder.SUMMARY, summary)
        bpb = summary["val_bpb"]
        print(f"{self.config['name']}: finished, validation {bpb:.4f} bits per byte", flush=True)

    def _sample(self, state: state_lib.TrainState) -> str:
        settings = self.config["sample"]
        prompt = [tokenizer.BOS, *tokenizer.encode(settings["prompt"]).tolist()]
        (tokens,) = generate_lib.generate(
            self.model,
            state.params,
            [prompt],
            length=settings["length"],
            temperature=settings["temperature"],
            top_k=settings["top_k"],
            key=jax.random.fold_in(state.key, state.step),
        )
        return tokenizer.to_text(tokens) + "\n"


def build_model(model: Mapping[str, Any], *, vocab_size: int) -> transformer.Transformer:
    """The model of `config.model`: fields of `TransformerConfig`, the pattern as an expression.

    `pattern` is text for `patterns.parse`; a tuple of texts is a schedule of layers.

    Raises:
      ValueError: a field or a pattern is unknown or wrong.

    >>> build_model({"pattern": "local(window=8)", "num_layers": 2}, vocab_size=64).config.pattern
    Local(window=8, reach=None)
    """
    fields = dict(model)
    pattern = fields.pop("pattern")
    if isinstance(pattern, str):
        pattern = patterns.parse(pattern)
    else:
        pattern = per_layer.PerLayer(tuple(patterns.parse(p) for p in pattern))
    known = list(transformer.TransformerConfig.__dataclass_fields__)
    for name in fields:
        if name not in known:
            near = config_check.nearest(name, known)
            raise ValueError(f"config.model.{name} is unknown; the nearest valid name is {near}")
    if not pattern.causal:
        raise ValueError(
            f"pattern={pattern.expression()} must be causal, or the model sees what it is to "
            "predict; `causal() & (...)` makes it so"
        )
    return transformer.Transformer(
        transformer.TransformerConfig(vocab_size=vocab_size, pattern=pattern, **fields)
    )


def attention_cost(
    config: transformer.TransformerConfig, *, context: int, batch_size: int
) -> dict[str, float]:
    """Densities (means over layers) and attention FLOPs of one training step, from the masks.

    FLOPs are those of the products in forward and backward pass of all layers and rows, over
    visible pairs (`useful_flops`) and over active blocks (`executed_flops`).

    >>> config = transformer.TransformerConfig(vocab_size=64, num_layers=2, embed_dim=32)
    >>> attention_cost(config, context=128, batch_size=1)["token_density"]
    0.50390625
    """
    block = config.block or tiles.mask_block(context)
    cost = dict.fromkeys(("token_density", "block_density", "useful_flops", "executed_flops"), 0.0)
    heads, sizes = config.num_heads, (config.head_dim, config.num_heads)
    for pattern in config.layer_patterns():
        per_heads = pattern.for_heads(heads) if hasattr(pattern, "for_heads") else pattern
        counted = stats.of(per_heads, q_len=context, block_q=block, block_kv=block)
        cost["token_density"] += counted.token_density / config.num_layers
        cost["block_density"] += counted.block_density / config.num_layers
        for backward in (False, True):
            useful = counted.useful_flops(*sizes, backward=backward)
            executed = counted.executed_flops(*sizes, backward=backward)
            cost["useful_flops"] += batch_size * useful
            cost["executed_flops"] += batch_size * executed
    return cost


def _last(history: list[dict[str, Any]], name: str) -> float | None:
    return next((line[name] for line in reversed(history) if name in line), None)


def _plain(config: Any) -> dict[str, Any]:
    """Nested dicts of JSON values, whatever kind of config it was."""
    plain = {}
    for key, value in config.items():
        if hasattr(value, "items"):
            plain[key] = _plain(value)
        else:
            plain[key] = list(value) if isinstance(value, tuple) else value
    return plain


_CONFIG = config_flags.DEFINE_config_file("config", None, "FILE.py[:ARGUMENT]")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run folder.", required=True)


def main(argv: list[str]) -> int:
    """Runs the command line."""
    _quiet_without_tpu()
    # Orbax and TFDS report every file they touch; ours is one line per choice.
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("sparse_attn").setLevel(logging.INFO)
    try:
        if argv[1:]:
            raise UsageError(f"argument {argv[1]!r} must be a flag such as --workdir=DIR")
        return int(train(_CONFIG.value, _WORKDIR.value))
    except UsageError as error:
        return _fail(error, exits.ExitCode.USAGE)
    except checkpoint_lib.CheckpointError as error:
        return _fail(error, exits.ExitCode.CHECKPOINTS)


def _quiet_without_tpu() -> None:
    """libtpu comes with the test requirements, and warns at length where there is no TPU."""
    if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*"):
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5e-1")


def _fail(error: Exception, code: exits.ExitCode) -> int:
    print(f"error: {error}", file=sys.stderr)
    return int(code)


if __name__ == "__main__":
    app.run(main, flags_parser=config_check.parse_flags)
