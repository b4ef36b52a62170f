"""A checkpoint opened without its devices: the attention shown is the attention of the model."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn import patterns, viz
from sparse_attn.models import attention as attention_lib
from sparse_attn.models import transformer, vit
from sparse_attn.patterns import base
from sparse_attn.train import checkpoint, tasks
from sparse_attn.viz import inspect_run

MODEL = {
    "pattern": ["per_head((local(window=9) | sinks(tokens=2), causal()))", "local(window=20)"],
    "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "embed_dim": 16,
    "mlp_dim": 16, "sink_logits": "learned", "attention_soft_cap": 3.0, "layer_loop": "scan",
    "impl": "pallas_tpu", "block": 16, "remat": "block",
}  # fmt: skip


SAMPLE = "The line looks back and picks a few words from afar."


def save(folder, config):
    """A run folder as training leaves it, with drawn parameters in place of trained ones."""
    task = tasks.of({**config, "model": {**config["model"], "impl": "reference"}})
    inputs = jnp.zeros(task.inputs.shape, task.inputs.dtype)
    shapes = jax.eval_shape(task.model.init, jax.random.key(0), inputs)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    with checkpoint.Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(7, {"params": params}, data_state=None)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "text"
    save(folder, {"name": "a", "data": {"context": 40}, "model": MODEL})
    (folder / "sample.txt").write_text(SAMPLE)
    return viz.load_for_inspection(folder)


@pytest.fixture(scope="module")
def attention(text_run):
    return text_run.attend_to(np.arange(60, dtype=np.int32))


def test_what_is_opened(text_run):
    assert text_run.step == 7
    assert text_run.config["data"]["context"] == 40
    assert text_run.summary == {}
    assert text_run.model.config.impl is None
    config = text_run.model.config
    assert (config.num_layers, config.layer_loop, config.remat) == (2, "unroll", "none")


def test_probabilities_are_those_of_the_model(text_run, attention):
    """Probabilities times values through the output projection is what each layer puts out."""

    @jax.jit
    def run(params, tokens):
        outs, values = [], []

        def keep(next_fun, args, kwargs, context):
            out = next_fun(*args, **kwargs)
            if context.method_name == "__call__":
                if isinstance(context.module, attention_lib.SelfAttention):
                    outs.append(out[0])
                elif context.module.name == "value":
                    values.append(out[0])
            return out

        config = dataclasses.replace(text_run.model.config, impl="reference")
        with nn.intercept_methods(keep):
            transformer.Transformer(config).apply({"params": params}, tokens)
        return outs, values

    outs, values = jax.tree.map(
        np.asarray, run(text_run.params, np.arange(40, dtype=np.int32)[None])
    )
    assert len(outs) == 2
    for layer, (out, value) in enumerate(zip(outs, values, strict=True)):
        kernel = np.asarray(text_run.params["layers"]["attention"]["out"]["kernel"])[layer]
        got = sum(
            np.asarray(attention.probabilities(layer, head)) @ value[:, head // 2] @ kernel[head]
            for head in range(4)
        )
        np.testing.assert_allclose(got, out, atol=2e-4)


def test_block_mass_sums_probabilities_in_pieces(attention, monkeypatch):
    whole = attention.block_mass(1, 2, block=16)
    rows = attention.probabilities(1, 2)
    assert whole.shape == (3, 3)
    np.testing.assert_allclose(whole[2, 1], rows[32:, 16:32].sum() / 8, rtol=1e-5)
    monkeypatch.setattr(inspect_run, "_CHUNK", 1)
    np.testing.assert_allclose(attention.block_mass(1, 2, block=16), whole, rtol=1e-5)


def test_mass_against_patterns(attention):
    # Layer 1: the window is 20 wide, the sink takes its part.
    kept = [attention.share(1, 0, patterns.parse(f"local(window={n})")) for n in (1, 5, 20, 40)]
    assert kept == sorted(kept)
    assert (
        kept[2] == pytest.approx(kept[3]) == pytest.approx(attention.probabilities(1, 0).sum() / 40)
    )
    assert kept[0] == pytest.approx(np.trace(attention.probabilities(1, 0)) / 40)
    assert attention.pattern(0, 1) == patterns.Causal()
    outside = attention.probabilities(1, 0, pattern=patterns.Causal())
    assert attention.probabilities(1, 0)[39, :19].sum() == 0 < outside[39, :19].sum()


def test_queries_that_see_nothing_attend_to_nothing(attention):
    blind = dataclasses.replace(attention, sink_logits=None)
    nothing = patterns.parse("causal() & ~causal()")
    assert (blind.probabilities(0, 0, pattern=nothing) == 0).all()
    assert blind.probabilities(0, 0).sum(-1) == pytest.approx(1)


def test_table_and_figure(attention):
    lines = attention.table(block=8).splitlines()
    assert len(lines) == 2 + 2 * 4
    assert lines[2].split()[:2] == ["0", "0"]
    assert "local(window=20)" in lines[6]
    figure = attention.show(0, block=8)
    assert len(figure.axes) == 4
    np.testing.assert_array_equal(
        figure.axes[1].images[0].get_array(), attention.block_mass(0, 1, block=8)
    )
    hidden = np.isfinite(figure.axes[1].images[1].get_array().filled(np.nan))
    np.testing.assert_array_equal(hidden, np.triu(np.ones((5, 5)), 1))


def test_text_and_the_own_sample_are_tokens(text_run):
    own, same = text_run.attend_to(), text_run.attend_to(SAMPLE)
    tokens = np.append(np.int32(257), np.frombuffer(SAMPLE.encode(), np.uint8))
    for other in (same, text_run.attend_to(tokens)):
        assert len(other.keys[0]) == 40  # a mark and 39 bytes
        np.testing.assert_array_equal(own.queries[1], other.queries[1])


def test_a_vision_transformer(tmp_path):
    model = {
        "pattern": "neighborhood(shape=(4, 4), kernel_size=3)", "patch": 2, "tile": 2,
        "num_layers": 1, "num_heads": 2, "embed_dim": 8, "mlp_dim": 8,
    }  # fmt: skip
    save(tmp_path / "run", {"task": "images", "data": {"name": "digits"}, "model": model})
    run = viz.load_for_inspection(tmp_path / "run")
    assert isinstance(run.model, vit.VisionTransformer)
    seen = run.attend_to(np.ones((8, 8, 1), np.float32))
    rows = seen.probabilities(0, 1)
    assert rows.shape == (16, 16)
    assert ((rows > 0).sum(-1) == 9).all()
    with pytest.raises(ValueError, match="has no sample"):
        run.attend_to()


def test_keys_that_no_pattern_names_are_refused():
    x = np.zeros((4, 1, 2), np.float32)
    pooled = patterns.parse("cross_grid(shape=(2, 2), key_shape=(1, 1), reach=0)")
    attention = inspect_run.Attention(queries=(x,), keys=(x,), patterns=(pooled,))
    with pytest.raises(NotImplementedError, match="averages of keys"):
        attention.probabilities(0, 0)
    chosen = dataclasses.replace(attention, patterns=(base.Expression(),))
    with pytest.raises(NotImplementedError, match="chooses its keys at run time"):
        chosen.probabilities(0, 0)
    dense = chosen.probabilities(0, 0, pattern=patterns.parse("causal()"))
    np.testing.assert_allclose(dense, np.tri(4) / np.arange(1, 5)[:, None], rtol=1e-6)


def test_folders_that_are_no_runs(tmp_path, text_run):
    with pytest.raises(FileNotFoundError, match=r"must be a run folder: it has no config\.json"):
        viz.load_for_inspection(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="has no step 3"):
        viz.load_for_inspection(text_run.folder, step=3)
