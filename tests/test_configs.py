"""Every config and sweep expands, builds its model, and is what its golden file says.

`UPDATE_GOLDEN=1 pytest tests/test_configs.py` writes the golden files anew; read the difference.
"""

import functools
import importlib
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import pytest

from configs import common, lm, quickstart, vit
from sparse_attn.data import images, tokenizer
from sparse_attn.data.synthetic import catalog
from sparse_attn.launch import units
from sparse_attn.train import config_check, flops, tasks

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
FILES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "common")
# The arguments of a config file that get a golden dump, besides none.
ARGUMENTS = {
    "lm": (*(f"{s},{v}" for s in lm.RUNS for v in ("window", "dense")), "350m,alternating,tokens"),
    "quickstart": (*quickstart.PATTERNS, *(f"{v},tiny" for v in quickstart.PATTERNS)),
    "vit": (*vit.COMPARED, "swin,moving_digits", "maxvit,fashion_mnist", "vil,tiny"),
}
CASES = [(file, argument) for file in FILES for argument in ("", *ARGUMENTS.get(file, ()))]


def load(file: str, argument: str = ""):
    path = f"configs/{file}.py"
    return config_check.load(str(ROOT / path) + (f":{argument}" if argument else ""))


def shapes(config):
    """Shapes of parameters and logits, without computing anything."""
    task = tasks.of(config.to_dict())
    one = task.inputs
    batch = jax.ShapeDtypeStruct((config.data.batch_size, *one.shape[1:]), one.dtype)
    return jax.eval_shape(task.model.init_with_output, jax.random.key(0), batch)


@functools.cache
def built(file: str, argument: str):
    """The config, and the shapes of its logits and parameters."""
    config = load(file, argument)
    return config, *shapes(config)


def dump(config, variables) -> str:
    """The resolved config as sorted lines, the number of parameters and the densities."""
    values = config.to_dict()
    lines = []
    for name in sorted(config_check.dotted_names(values)):
        node = values
        for part in name.split("."):
            node = node[part]
        lines.append(f"{name} = {node!r}")
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))
    task = tasks.of(values)
    seen = flops.attention_cost(task.model.config, context=task.row_tokens, batch_size=1)
    pairs, blocks = (f"{seen[f'{what}_density']:.2%}" for what in ("token", "block"))
    lines += [f"# parameters: {count:,}", f"# density: {pairs} of pairs, {blocks} of blocks"]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(("file", "argument"), CASES)
def test_config_is_its_golden_file(file, argument):
    config, _, variables = built(file, argument)
    text = dump(config, variables)
    path = GOLDEN / f"{'_'.join(filter(None, (file, argument.replace(',', '_'))))}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.is_file(), f"UPDATE_GOLDEN=1 pytest {__file__} writes {path}"
    assert text == path.read_text(), f"UPDATE_GOLDEN=1 pytest {__file__} accepts the change"


def test_every_golden_file_has_a_config():
    names = {"_".join(filter(None, (f, a.replace(",", "_")))) for f, a in CASES}
    assert {path.stem for path in GOLDEN.glob("*.txt")} == names


# Of a size of decoders one pattern is enough: the other differs in what is visible.
@pytest.mark.parametrize(("file", "argument"), [c for c in CASES if not c[1].endswith(",dense")])
def test_model_gives_logits_for_the_batch(file, argument):
    config, logits, _ = built(file, argument)
    if config.get("task") == "images":
        row = (images.source(config.data.name).num_classes,)
    elif config.get("task") == "synthetic":
        task = catalog.parse(config.data.task)
        row = (task.length, task.vocab_size)
    else:
        row = (config.data.context, tokenizer.VOCAB_SIZE)
    assert logits.shape == (config.data.batch_size, *row)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("file", FILES)
def test_every_sweep_expands_and_builds(file):
    module = importlib.import_module(f"configs.{file}")
    sweeps = [name.removeprefix("sweep_") for name in vars(module) if name.startswith("sweep_")]
    for name in sweeps:
        path = str(ROOT / "configs" / f"{file}.py")
        work = units.expand(
            config_check.load(path),
            units.points_of(path, name),
            config_spec=path,
            workdir="runs",
        )
        for unit in work:
            config = config_check.load(path)
            units.apply(config, dict(unit.overrides))
            tasks.of(config.to_dict())


@pytest.mark.parametrize("file", FILES)
def test_configs_are_small(file):
    assert len(config_check.dotted_names(load(file).to_dict())) <= 40


def test_quickstart_is_five_causal_patterns_and_nothing_else_differs():
    points = list(quickstart.sweep_patterns())
    assert [set(p) for p in points] == [{"name", "model.pattern"}] * 5
    for point in points:
        variant = quickstart.get_config(point["name"])
        assert variant.model.pattern == point["model.pattern"]
        model = tasks.build_model(variant.model.to_dict(), vocab_size=8)
        assert model.config.pattern.causal
    assert quickstart.get_config().train.steps >= 150


def test_quickstart_model_has_one_to_two_million_parameters():
    _, variables = shapes(quickstart.get_config())
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))
    assert 1_000_000 <= count <= 2_000_000


@pytest.mark.parametrize("size", lm.RUNS)
def test_decoders_have_the_size_of_their_name_and_spend_its_budget(size):
    for variant in ("window", "dense"):
        config = lm.get_config(f"{size},{variant}")
        _, variables = shapes(config)
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))
        assert count == pytest.approx(float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]], rel=0.01)
        used = flops.utilization(
            tasks.of(config.to_dict()).model.config, variables["params"],
            context=config.data.context, batch_size=1, device_kind="TPU v4", num_devices=1,
        )  # fmt: skip
        tokens = config.train.steps * config.data.context * config.data.batch_size
        assert used.useful_per_token * tokens == pytest.approx(120 * count**2, rel=0.02)
        equal = lm.get_config(f"{size},{variant},tokens")
        tokens = equal.train.steps * equal.data.context * equal.data.batch_size
        assert tokens == pytest.approx(20 * count, rel=0.02)


@pytest.mark.parametrize(
    ("argument", "fields"),
    [
        (None, {"variant": "full", "size": "small"}),
        ("", {"variant": "full", "size": "small"}),
        ("tiny", {"variant": "full", "size": "tiny"}),
        ("tiny,local", {"variant": "local", "size": "tiny"}),
        ("size=tiny,variant=local", {"variant": "local", "size": "tiny"}),
    ],
)
def test_parse_arg(argument, fields):
    choices = {"variant": ("full", "local"), "size": ("small", "tiny")}
    assert common.parse_arg(argument, **choices) == fields


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lokal", "argument 'lokal' must be one of: variant .*nearest: local"),
        ("variant=tiny", "argument 'variant=tiny' must be one of"),
        ("full,local", "must give variant only once"),
    ],
)
def test_parse_arg_names_mistakes(argument, message):
    with pytest.raises(ValueError, match=message):
        common.parse_arg(argument, variant=("full", "local"), size=("small", "tiny"))
