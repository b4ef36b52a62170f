"""What a run learns, by `config.task`: "text" (the next byte, the default), "images" (classes) or
"synthetic" (answers in rows of tokens, `data/synthetic/`).

A task builds the model, opens the data, says how predictions are rated and what a summary tells;
all else about a run is the same.
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from sparse_attn import patterns
from sparse_attn.data import corpus as corpus_lib
from sparse_attn.data import images as images_lib
from sparse_attn.data import prepare, text, tokenizer
from sparse_attn.data.synthetic import catalog
from sparse_attn.masks import lower
from sparse_attn.models import transformer, vit
from sparse_attn.parallel import attention, balance, split
from sparse_attn.parallel import mesh as mesh_lib
from sparse_attn.patterns import per_layer
from sparse_attn.train import config_check
from sparse_attn.train import evaluate as evaluate_lib
from sparse_attn.train import generate as generate_lib
from sparse_attn.train import state as state_lib


class Text:
    """A decoder on text: bits per byte, and a sample at the end.

    Attributes:
      model: the Linen module.
      inputs: shape and dtype of one example, for `state.create`.
      row_tokens: tokens per row, of which attention costs depend.
      num_tokens: counts those of a batch.
      place: puts a batch on the devices.
      data: after `open_data`: what was found, with `name`, `sha256`, `describe()`, `to_json()`.
      train_batches: after `open_data`: an endless, resumable iterator.
      eval_batches: after `open_data`: the batches of every evaluation.
    """

    def __init__(self, config: Mapping[str, Any], mesh: jax.sharding.Mesh | None = None):
        self._config = config
        self._unsplit = build_model(config["model"], vocab_size=tokenizer.VOCAB_SIZE)
        self.row_tokens = config["data"]["context"]
        self.inputs = jax.ShapeDtypeStruct((1, self.row_tokens), jnp.int32)
        self.model, self._rows = _on_mesh(self._unsplit, config, mesh, self.row_tokens)
        self.place = _place(self._rows)
        # Each process counts its own rows for all: exact but for the padding that ends an epoch.
        count = 1 if self._rows is None else self._rows.shard_count
        self.num_tokens = lambda batch: count * state_lib.num_tokens(batch)

    def open_data(self) -> None:
        """Finds and prepares the text; prints what it is."""
        data = self._config["data"]
        self.data = corpus_lib.resolve(
            data["path"], prepared_dir=data["prepared_dir"], max_bytes=data["max_bytes"]
        )
        print(self.data.describe(), flush=True)
        cache = os.environ.get("SPARSE_ATTN_CACHE") or pathlib.Path.home() / ".cache/sparse_attn"
        prepared = prepare.prepare(self.data, cache)
        shape = {"context": data["context"], "batch_size": data["batch_size"]}
        if self._rows is not None:
            shape |= {"shard_index": self._rows.shard_index, "shard_count": self._rows.shard_count}
        self.train_batches = text.loader(
            prepared, split="train", seed=self._config["seed"], **shape
        )
        # The same windows at every evaluation, whatever the seed; kept, as they are few.
        batches = text.loader(prepared, split="validation", seed=0, repeat=False, **shape)
        count = self._config["train"]["eval_batches"]
        self.eval_batches = list(itertools.islice(batches, count))

    def evaluator(self) -> Callable[[PyTree], dict[str, float]]:
        """Gives `evaluate(params)`, with `bits_per_byte`."""
        step = evaluate_lib.make_eval_step(self.model)
        return lambda params: evaluate_lib.evaluate(
            step, params, map(self.place, self.eval_batches)
        )

    def results(self, last: Callable[[str], float | None]) -> dict[str, float | None]:
        """What the summary tells, given the last value of a name that `evaluate` gave."""
        return {"val_bpb": last("bits_per_byte")}

    def sample(self, state: state_lib.TrainState) -> str:
        """A continuation of the prompt."""
        settings = self._config["sample"]
        prompt = [tokenizer.BOS, *tokenizer.encode(settings["prompt"]).tolist()]
        (tokens,) = generate_lib.generate(
            self._unsplit,
            state.params,
            [prompt],
            length=settings["length"],
            temperature=settings["temperature"],
            top_k=settings["top_k"],
            key=jax.random.fold_in(state.key, state.step),
        )
        return tokenizer.to_text(tokens) + "\n"


class Images:
    """A classifier of images or videos: accuracy on the test images; attributes as of `Text`."""

    def __init__(self, config: Mapping[str, Any], mesh: jax.sharding.Mesh | None = None):
        self._config = config
        model = build_classifier(config["model"], images_lib.source(config["data"]["name"]))
        self.inputs = jax.ShapeDtypeStruct((1, *model.config.image_shape), jnp.float32)
        self.row_tokens = model.config.num_tokens
        self.model, rows = _on_mesh(model, config, mesh, self.row_tokens)
        self.place = _place(rows)
        self.num_tokens = lambda batch: int(np.count_nonzero(batch["weights"])) * self.row_tokens

    def open_data(self) -> None:
        """Reads the images; prints what they are."""
        batch_size = self._config["data"]["batch_size"]
        self.data = images_lib.load(self._config["data"]["name"])
        print(self.data.describe(), flush=True)
        self.train_batches = images_lib.Batches(
            self.data, batch_size=batch_size, seed=self._config["seed"]
        )
        self._eval_batches = images_lib.evaluation_batches(self.data, batch_size=batch_size)

    def evaluator(self) -> Callable[[PyTree], dict[str, float]]:
        """Gives `evaluate(params)`, with `accuracy`."""
        step = evaluate_lib.make_class_step(self.model)
        return lambda params: evaluate_lib.evaluate(
            step, params, map(self.place, self._eval_batches)
        )

    def results(self, last: Callable[[str], float | None]) -> dict[str, float | None]:
        """As of `Text`."""
        return {"test_accuracy": last("accuracy"), "test_loss": last("loss")}

    def sample(self, state: state_lib.TrainState) -> None:
        """None: a class has no text to show."""


class Synthetic:
    """A decoder on a synthetic task: accuracy on new examples; attributes as of `Text`.

    `config.data.task` is an expression for `catalog.parse`, such as "mqar(length=64)".

    Raises:
      ValueError: there is no such task, or a decoder learns nothing by it.
    """

    def __init__(self, config: Mapping[str, Any], mesh: jax.sharding.Mesh | None = None):
        self._config, self._task = config, catalog.parse(config["data"]["task"])
        if (reason := self._task.not_for_decoder) is not None:
            raise ValueError(f"data.task={config['data']['task']!r} is not for a decoder: {reason}")
        self._vocab = self._task.vocab_size
        self.row_tokens = self._task.length
        self.inputs = jax.ShapeDtypeStruct((1, self.row_tokens), jnp.int32)
        model = build_model(config["model"], vocab_size=self._vocab)
        self.model, rows = _on_mesh(model, config, mesh, self.row_tokens)
        self.place = _place(rows)
        self.num_tokens = state_lib.num_tokens

    def open_data(self) -> None:
        """Prints what is drawn; the test examples are the same at every evaluation and seed."""
        self.data = catalog.Drawn(self._task)
        print(self.data.describe(), flush=True)
        size = self._config["data"]["batch_size"]
        self.train_batches = catalog.Batches(
            self._task, split="train", seed=self._config["seed"], batch_size=size
        )
        test = catalog.Batches(self._task, split="test", seed=0, batch_size=size)
        self._eval_batches = list(itertools.islice(test, self._config["train"]["eval_batches"]))

    def evaluator(self) -> Callable[[PyTree], dict[str, float]]:
        """Gives `evaluate(params)`, with `accuracy` (of answers)."""
        step = evaluate_lib.make_class_step(self.model)
        return lambda params: evaluate_lib.evaluate(
            step, params, map(self.place, self._eval_batches)
        )

    def results(self, last: Callable[[str], float | None]) -> dict[str, float | None]:
        """As of `Text`."""
        return {
            "test_accuracy": last("accuracy"), "test_loss": last("loss"),
            "chance": self._task.chance,
        }  # fmt: skip

    def sample(self, state: state_lib.TrainState) -> None:
        """None: accuracy says it all."""


TASKS = {"text": Text, "images": Images, "synthetic": Synthetic}


def of(
    config: Mapping[str, Any], mesh: jax.sharding.Mesh | None = None
) -> Text | Images | Synthetic:
    """The task of a config, with its model built and no data opened; None = one device.

    Raises:
      ValueError: there is no such task, the model is not one for it, or the mesh does not fit it.

    >>> of({"task": "pictures"})
    Traceback (most recent call last):
    ValueError: task='pictures' must be one of 'text', 'images', 'synthetic'
    """
    name = config.get("task", "text")
    if name not in TASKS:
        raise ValueError(f"task={name!r} must be one of {', '.join(map(repr, TASKS))}")
    return TASKS[name](config, mesh)


def _on_mesh(model, config, mesh, length):
    """The model with its tokens split as `config.mesh.sequence` says, and where batches go."""
    if mesh is None:
        return model, None
    scheme, _, kind = config["mesh"]["sequence"].partition(":")
    ranks = mesh.shape["seq"]
    masks = _layer_masks(model.config, length, chunks=ranks) if kind == "balanced" else []
    order = balance.order(kind or "text", masks, ranks=ranks)
    if order is not None and isinstance(model, vit.VisionTransformer):
        raise ValueError(f"mesh.sequence={config['mesh']['sequence']!r}: images keep their order")
    tokens = attention.Tokens(scheme, order)
    rows = mesh_lib.Batches(
        mesh,
        batch_size=config["data"]["batch_size"],
        length=length,
        places=None if order is None else tokens.places(length),
    )
    return type(model)(dataclasses.replace(model.config, tokens=tokens)), rows


def _layer_masks(model, length, *, chunks):
    """Of each layer, in blocks that divide each of so many parts of a row."""
    block = model.block or split.block_of(length, chunks=chunks)
    patterns_of_layers = model.layer_patterns()
    found = {
        pattern: lower.lower(pattern, q_len=length, block_q=block, block_kv=block)
        for pattern in set(patterns_of_layers)
    }
    return [found[pattern] for pattern in patterns_of_layers]


def imbalance(task: Text | Images | Synthetic, mesh: jax.sharding.Mesh) -> dict[str, float] | None:
    """What `balance.imbalance` finds for the layers of a task, by order of the tokens.

    Every order of `balance.ORDERS` that divides the row and that the task may take: images keep the
    order of the text. None where no token order changes the work: one rank, or "ulysses", whose
    ranks compute whole rows of some heads.
    """
    model, ranks = task.model.config, mesh.shape["seq"]
    if ranks == 1 or model.tokens.scheme == "ulysses":
        return None
    kinds = ("text",) if isinstance(task, Images) else balance.ORDERS
    found = {}
    for kind in kinds:
        chunks = 2 * ranks if kind == "zigzag" else ranks
        if task.row_tokens % chunks == 0:
            masks = _layer_masks(model, task.row_tokens, chunks=chunks)
            found[kind] = balance.imbalance(masks, kind=kind, ranks=ranks)
    return found


def _place(rows: mesh_lib.Batches | None) -> Callable[[state_lib.Batch], state_lib.Batch]:
    return jax.device_put if rows is None else rows.place


def build_model(model: Mapping[str, Any], *, vocab_size: int) -> transformer.Transformer:
    """The model of `config.model`: fields of `TransformerConfig`, the pattern as an expression.

    `pattern` is text for `patterns.parse`; a tuple of texts is a schedule of layers.

    Raises:
      ValueError: a field or a pattern is unknown or wrong.

    >>> build_model({"pattern": "local(window=8)", "num_layers": 2}, vocab_size=64).config.pattern
    Local(window=8, reach=None)
    """
    fields = _fields(model, transformer.TransformerConfig)
    pattern = fields["pattern"]
    if not pattern.causal:
        raise ValueError(
            f"pattern={pattern.expression()} must be causal, or the model sees what it is to "
            "predict; `causal() & (...)` makes it so"
        )
    return transformer.Transformer(transformer.TransformerConfig(vocab_size=vocab_size, **fields))


def build_classifier(model: Mapping[str, Any], source: images_lib.Source) -> vit.VisionTransformer:
    """The model of `config.model` for images of a source, as `build_model`.

    Raises:
      ValueError: a field or a pattern is unknown or wrong.

    >>> model = {"pattern": "axial(shape=(4, 4), axes=(1,))", "patch": 2}
    >>> build_classifier(model, images_lib.source("digits")).config.grid
    (4, 4)
    """
    fields = _fields(model, vit.VisionTransformerConfig)
    return vit.VisionTransformer(
        vit.VisionTransformerConfig(
            image_shape=source.image_shape, num_classes=source.num_classes, **fields
        )
    )


def _fields(model: Mapping[str, Any], config_class: type) -> dict[str, Any]:
    """The fields of `config.model` with the pattern parsed, lists as tuples and names checked."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in model.items()}
    pattern = fields["pattern"]
    if isinstance(pattern, str):
        fields["pattern"] = patterns.parse(pattern)
    else:
        fields["pattern"] = per_layer.PerLayer(tuple(patterns.parse(p) for p in pattern))
    known = list(config_class.__dataclass_fields__)
    for name in fields:
        if name not in known:
            near = config_check.nearest(name, known)
            raise ValueError(f"config.model.{name} is unknown; the nearest valid name is {near}")
    return fields
