import jax
import numpy as np
import pytest

from sparse_attn.models import transformer, vit
from sparse_attn.parallel import attention, mesh
from sparse_attn.patterns import full, local
from sparse_attn.train import optim, state


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ("data=1", (1, 1, 1, 1)),
        ("data=-1", (8, 1, 1, 1)),
        ("seq=2, data=-1", (4, 1, 2, 1)),
        ({"fsdp": 4, "tensor": 2}, (1, 4, 1, 2)),
        ("tensor=2", (1, 1, 1, 2)),
    ],
)
def test_sizes(axes, expected):
    assert tuple(mesh.sizes(axes, num_devices=8).values()) == expected


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("model=2", "'model' must be one of data, fsdp, seq, tensor"),
        ("data=-1,seq=-1", "must have one -1 at most"),
        ("data=-1,seq=3", "sizes that divide the 8 devices"),
        ("data=0", "data=0 must be >= 1, or -1"),
        ("data=16", "needs 16 devices, there are 8"),
        ("data", "must be axis=size,..., each axis once"),
        ("data=2,data=4", "each axis once"),
    ],
)
def test_sizes_name_mistakes(axes, message):
    with pytest.raises(ValueError, match=message):
        mesh.sizes(axes, num_devices=8)


def test_the_first_rule_that_is_found_decides():
    params = {"mlp": {"up": {"kernel": np.ones((2, 4, 8))}}}
    rules = ((r"up/kernel$", (None, None, ["fsdp", "tensor"])), *mesh.RULES)
    (spec,) = jax.tree.leaves(mesh.parameter_specs(params, rules=rules))
    assert tuple(spec) == (None, None, ("fsdp", "tensor"))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (((r"down$", ()),), "none matches 'mlp/up/kernel' of shape .2, 4, 8."),
        (((r"up", (None, "fsdp")),), "for each dimension"),
        (((r"up", (None, "model", None)),), "must name an axis of data, fsdp, seq, tensor"),
    ],
)
def test_rules_that_do_not_fit_are_named(rules, message):
    with pytest.raises(ValueError, match=message):
        mesh.parameter_specs({"mlp": {"up": {"kernel": np.ones((2, 4, 8))}}}, rules=rules)


@pytest.mark.parametrize("output", ["tied", "untied"])
def test_the_usual_rules_know_every_array_of_a_training_state(output):
    model = transformer.Transformer(
        transformer.TransformerConfig(
            vocab_size=16, num_layers=1, embed_dim=16, num_heads=2, sink_logits="learned",
            output=output, pattern=local.Local(window=4),
        )
    )  # fmt: skip
    made = jax.eval_shape(
        lambda: state.create(model, optim.adamw(0.1), key=jax.random.key(0), length=8)
    )
    specs = mesh.parameter_specs(made)
    split = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, spec in jax.tree_util.tree_leaves_with_path(specs.params)
        if not any(spec)
    }
    assert all(name.endswith("scale") for name in split)
    moments = specs.opt_state[1][0]
    assert moments.mu == specs.params
    assert moments.nu == specs.params
    assert specs.step == specs.key == jax.sharding.PartitionSpec()


def test_the_usual_rules_know_a_vision_transformer():
    model = vit.VisionTransformer(
        vit.VisionTransformerConfig(
            image_shape=(8, 8, 1), num_classes=3, patch=2, registers=2, num_layers=1, embed_dim=16,
            num_heads=2, pattern=full.Full(),
        )
    )  # fmt: skip
    params = jax.eval_shape(model.init, jax.random.key(0), jax.numpy.zeros((1, 8, 8, 1)))["params"]
    specs = mesh.parameter_specs(params)
    assert tuple(specs["patch_embedding"]["kernel"]) == (None, "fsdp")
    assert tuple(specs["head"]["kernel"]) == ("fsdp", None)


def test_without_a_mesh_nothing_changes():
    x = jax.numpy.ones((2, 4, 8))
    assert mesh.shard(x, "batch", "length", None) is x
    with jax.set_mesh(mesh.make("data=1")):
        assert mesh.current() is None


def test_tokens_name_mistakes():
    with pytest.raises(ValueError, match="scheme='rings' must be one of all_gather_kv, ring, uly"):
        attention.Tokens("rings")
    with pytest.raises(ValueError, match=r"each of 0 \.\. n-1 once"):
        attention.Tokens(order=(0, 2))
    q = np.ones((1, 8, 2, 4), np.float32)
    with pytest.raises(ValueError, match="order must be None where no seq axis"):
        attention.attend(
            *map(jax.numpy.asarray, (q, q, q)), mask=local.Local(window=2),
            tokens=attention.Tokens(order=(1, 0)),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("held", "rows", "shares"),
    [
        ({0: {(0, 2)}, 1: {(2, 4)}}, [0, 1, 2, 3], {0: 0, 1: 1}),
        ({0: {(2, 4)}, 1: {(0, 2)}}, [0, 1, 2, 3], {0: 1, 1: 0}),
        ({0: {(0, 4)}, 1: {(0, 4)}}, [0, 1, 2, 3], {0: 0, 1: 0}),
        ({0: {(0, 1), (3, 4)}, 1: {(1, 2), (2, 3)}}, [0, 2, 3, 1], {0: 0, 1: 1}),
    ],
)
def test_rows_of_processes_anywhere_in_the_mesh(held, rows, shares):
    read, found = mesh.rows_read(held, batch_size=4)
    assert read.tolist() == rows
    assert found == shares


@pytest.mark.parametrize("held", [{0: {(0, 2)}, 1: {(1, 4)}}, {0: {(0, 1)}, 1: {(1, 4)}}])
def test_rows_that_processes_cannot_share_out(held):
    with pytest.raises(ValueError, match="processes would hold rows"):
        mesh.rows_read(held, batch_size=4)
