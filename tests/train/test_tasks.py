"""Tasks: a classifier through the same trainer, its accuracy, what a batch of images must be."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import vit
from sparse_attn.data import images
from sparse_attn.train import evaluate, exits, main, metrics, state, tasks


def config_of(argument, **changes):
    config = vit.get_config(argument)
    config.model.impl = "reference"
    config.train.log_every = 1
    for name, value in changes.items():
        config.train[name] = value
    return config


def test_a_classifier_trains_and_tells_its_accuracy(tmp_path):
    folder = tmp_path / "run"
    assert main.train(config_of("swin,tiny"), folder) == exits.ExitCode.FINISHED
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"]
    assert summary["corpus"] == "scikit-learn digits"
    assert summary["tokens"] == 6 * 64 * 16  # Steps, images, patches.
    assert 0 <= summary["test_accuracy"] <= 1
    assert summary["token_density"] == pytest.approx((16 / 64 + 36 / 256) / 2)
    assert not (folder / "sample.txt").exists()
    lines = metrics.read_json_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "eval/accuracy" in line] == [3, 6]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[0] == pytest.approx(np.log(10), rel=1e-3)


@pytest.mark.slow
def test_a_classifier_goes_on_where_it_stopped(tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert main.train(config_of("full,tiny"), whole) == exits.ExitCode.FINISHED
    shutil.copytree(whole, pieces)
    shutil.rmtree(pieces / "checkpoints" / "6")
    (pieces / "summary.json").unlink()
    assert main.train(config_of("full,tiny"), pieces) == exits.ExitCode.FINISHED
    kept = [
        [
            (line["step"], line["train/loss"], line["data/crc32"])
            for line in metrics.read_json_lines(folder / "metrics.jsonl")
            if "data/crc32" in line
        ]
        for folder in (whole, pieces)
    ]
    assert kept[0] == kept[1]
    assert [step for step, *_ in kept[0]] == [1, 2, 3, 4, 5, 6]
    assert json.loads((pieces / "summary.json").read_text())["starts"] == 2


@pytest.mark.slow
def test_a_neighbourhood_reads_digits(tmp_path):
    config = config_of("neighborhood", eval_every=50, checkpoint_every=300, log_every=50)
    assert main.train(config, tmp_path) == exits.ExitCode.FINISHED
    assert json.loads((tmp_path / "summary.json").read_text())["test_accuracy"] > 0.95


def test_accuracy_counts_weights():
    class Fixed:
        def apply(self, variables, inputs):
            return jax.nn.one_hot(inputs[:, 0, 0, 0].astype(int), 10) * variables["params"]

    def batch(guesses, targets, weights):
        inputs = jnp.zeros((len(guesses), 2, 2, 1)).at[:, 0, 0, 0].set(jnp.array(guesses, float))
        return {"inputs": inputs, "targets": jnp.array(targets), "weights": jnp.array(weights)}

    batches = [
        batch([1, 2, 3], [1, 2, 4], [1.0, 1.0, 1.0]),
        batch([5, 6, 7], [5, 0, 7], [1.0, 0.0, 0.0]),
    ]
    result = evaluate.evaluate(evaluate.make_class_step(Fixed()), jnp.float32(2.0), batches)
    assert result["accuracy"] == 3 / 4
    assert result["tokens"] == 4
    norm = np.log(9 + np.exp(2.0))
    np.testing.assert_allclose(result["loss"], (3 * (norm - 2.0) + norm) / 4, rtol=1e-6)
    with pytest.raises(ValueError, match="eval batches hold no byte"):
        evaluate.evaluate(evaluate.make_class_step(Fixed()), jnp.float32(2.0), [])


def test_check_batch_knows_images():
    batch = next(images.Batches(images.load("digits"), batch_size=4, seed=0))
    state.check_batch(batch)
    with pytest.raises(ValueError, match=r"batch\['targets'\] of int64\[4\] must be int32\[4\]"):
        state.check_batch(batch | {"targets": batch["targets"].astype(np.int64)})
    with pytest.raises(ValueError, match=r"'weights'\] of float32\[3\] .* one per image"):
        state.check_batch(batch | {"weights": batch["weights"][:3]})


def test_a_tuple_of_patterns_is_a_schedule_of_layers():
    model = tasks.build_model(
        {"pattern": ("local(window=8)", "causal()"), "num_layers": 4}, vocab_size=64
    )
    names = [type(p).__name__ for p in model.config.layer_patterns()]
    assert names == ["Local", "Causal", "Local", "Causal"]
    with pytest.raises(ValueError, match=r"config.model.num_layer is unknown; .* num_layers"):
        tasks.build_model({"pattern": "causal()", "num_layer": 4}, vocab_size=64)


@pytest.mark.parametrize(
    "section, field, value, message",
    [
        ("model", "pattern", "swin(shape=(8, 8), window_size=2)", r"must have shape=\(4, 4\)"),
        ("model", "patch", 3, "patch=3 must divide image_shape"),
        ("data", "name", "mnist", "data.name='mnist' must be one of"),
        ("data", "batch_size", 5000, "batch_size=5000 must be in"),
        (None, "task", "pictures", "task='pictures' must be one of 'text', 'images', 'synthetic'"),
    ],
)
def test_usage_errors_are_named_and_write_nothing(tmp_path, section, field, value, message):
    config = config_of("swin,tiny")
    (config if section is None else config[section])[field] = value
    with pytest.raises(main.UsageError, match=message):
        main.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
