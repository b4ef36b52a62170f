"""The damage matrix: whatever happens to the files, a restore is right or refused, never wrong."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.train import checkpoint, digests, optim, state

# Orbax leaves the futures of reads that fail to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(value):
    # Numbers that do not compress, so that the largest file is one that holds them.
    rng = np.random.default_rng(value)
    params = {
        "dense": {"kernel": jnp.asarray(rng.standard_normal((64, 48), np.float32))},
        "norm": {"scale": jnp.full(48, float(value))},
    }
    opt_state = optim.adamw(1e-3).init(params)
    return state.TrainState(jnp.int32(value), params, opt_state, jax.random.key(value))


def same(a, b) -> bool:
    raw = [
        jax.tree.map(lambda x: jax.random.key_data(x) if x.dtype == a.key.dtype else x, t)
        for t in (a, b)
    ]
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and (x == y).all(), *raw))


def save(folder, *steps, keep=5):
    with checkpoint.Checkpoints(folder, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), data_state={"next": step})


def restore(folder, template=None):
    with checkpoint.Checkpoints(folder, keep=5) as checkpoints:
        return checkpoints.restore(make_state(0) if template is None else template)


def data_files(folder, step):
    """The files that hold the arrays, largest first."""
    files = [
        p for p in (folder / str(step) / "state").rglob("*") if p.is_file() and "/d/" in str(p)
    ]
    return sorted(files, key=lambda p: -p.stat().st_size)


def truncate(folder, step):
    path = data_files(folder, step)[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(folder, step):
    data_files(folder, step)[0].unlink()


def flip_bit(folder, step):
    path = data_files(folder, step)[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(folder, step):
    shutil.rmtree(folder / str(step))
    (folder / str(step)).mkdir()


def delete_manifest(folder, step):
    (folder / str(step) / "state" / "manifest.ocdbt").unlink()


def delete_meta(folder, step):
    shutil.rmtree(folder / str(step) / "meta")


def truncate_meta(folder, step):
    path = folder / str(step) / "meta" / "metadata"
    path.write_text(path.read_text()[:-20])


def change_data_state(folder, step):
    path = folder / str(step) / "meta" / "metadata"
    path.write_text(path.read_text().replace('"next": 2', '"next": 3'))


def rename(folder, step):
    (folder / str(step)).rename(folder / str(step + 1))


def other_tree(folder, step, change):
    """A whole and honest checkpoint of something else in the place of this step."""
    shutil.rmtree(folder / str(step))
    other = make_state(step)
    other.params["dense"]["kernel"] = change(other.params["dense"]["kernel"])
    with checkpoint.Checkpoints(folder, keep=5) as checkpoints:
        checkpoints.save(step, other, data_state={"next": step})


def wrong_shape(folder, step):
    other_tree(folder, step, lambda x: x[:, :10])


def wrong_dtype(folder, step):
    other_tree(folder, step, lambda x: x.astype(jnp.bfloat16))


DAMAGES = (
    truncate, delete, flip_bit, empty, delete_manifest, delete_meta, truncate_meta,
    change_data_state, rename, wrong_shape, wrong_dtype,
)  # fmt: skip


def test_a_step_comes_back_exactly_with_key_and_data_state(tmp_path):
    save(tmp_path, 1, 2)
    restored = restore(tmp_path)
    assert restored.step == 2
    assert same(restored.state, make_state(2))
    assert restored.data_state == {"next": 2}


def test_nothing_to_restore_is_none(tmp_path):
    assert restore(tmp_path / "new") is None


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damage_falls_back_to_the_step_before(tmp_path, caplog, damage):
    save(tmp_path, 1, 2)
    damage(tmp_path, 2)
    with caplog.at_level(logging.WARNING, logger=checkpoint.__name__):
        restored = restore(tmp_path)
    assert restored.step == 1
    assert same(restored.state, make_state(1))
    lines = [r.getMessage() for r in caplog.records if r.name == checkpoint.__name__]
    assert len(lines) == 1
    assert "rejected" in lines[0]
    assert "\n" not in lines[0]
    if damage in (flip_bit, wrong_shape, wrong_dtype):
        assert "params/dense/kernel" in lines[0]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damage_to_all_steps_is_one_error_that_names_them(tmp_path, damage):
    save(tmp_path, 2)
    damage(tmp_path, 2)
    with pytest.raises(checkpoint.CheckpointError, match=r"step [23]: .*another workdir"):
        restore(tmp_path)


def test_flipped_bit_is_found_by_digest_wherever_it_is(tmp_path):
    # Orbax may notice some flips itself; a flip in the numbers only the digest sees.
    state_arrays = digests.named(make_state(1))
    before = digests.of(state_arrays)
    rng = np.random.default_rng(0)
    for name, x in state_arrays.items():
        raw = np.array(x)
        flat = raw.reshape(-1).view(np.uint8)
        flat[rng.integers(flat.size)] ^= 1 << rng.integers(8)
        after = digests.of({**state_arrays, name: raw})
        assert [n for n in before if before[n]["digest"] != after[n]["digest"]] == [name]


def test_digest_sees_exchanged_elements():
    a, b = (digests.of({"x": jnp.array(v)})["x"] for v in ([[1.0, 2.0]], [[2.0, 1.0]]))
    assert a["digest"] != b["digest"]


def test_rejected_steps_do_not_block_saving_them_again(tmp_path):
    save(tmp_path, 1, 2, 3)
    flip_bit(tmp_path, 2)
    truncate(tmp_path, 3)
    with checkpoint.Checkpoints(tmp_path, keep=5) as checkpoints:
        assert checkpoints.restore(make_state(0)).step == 1
        assert checkpoints.steps() == [1]
        checkpoints.save(2, make_state(2), data_state={"next": 2})
    assert restore(tmp_path).step == 2
    assert sorted(p.name for p in (tmp_path / "rejected").iterdir()) == ["2", "3"]


def test_stray_and_temporary_files_do_not_matter(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "1" / "notes.txt").write_text("mine")
    (tmp_path / "1" / "state" / "notes.txt").write_text("mine")
    (tmp_path / "8").write_text("a file where a step would be")
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "9.orbax-checkpoint-tmp" / "state").write_text("half")
    assert restore(tmp_path).step == 1
    assert not (tmp_path / "9.orbax-checkpoint-tmp").exists()
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda x: x[:, :10],
            r"kernel is float32\[64, 48\] in the checkpoint and float32\[64, 10\]",
        ),
        (lambda x: x.astype(jnp.bfloat16), r"kernel is float32\[64, 48\] .* bfloat16\[64, 48\]"),
    ],
    ids=["shape", "dtype"],
)
def test_mismatch_is_refused_and_named_by_leaf(tmp_path, change, message):
    save(tmp_path, 1)
    template = make_state(0)
    template.params["dense"]["kernel"] = change(template.params["dense"]["kernel"])
    with pytest.raises(checkpoint.CheckpointError, match=f"params/dense/{message} in the model"):
        restore(tmp_path, template)
    assert restore(tmp_path).step == 1  # Nothing was moved.


def test_missing_and_additional_leaves_are_named(tmp_path):
    save(tmp_path, 1)
    template = make_state(0)
    template.params["new"] = template.params.pop("norm")
    with pytest.raises(checkpoint.CheckpointError) as error:
        restore(tmp_path, template)
    assert "params/new/scale is not in the checkpoint" in str(error.value)
    assert "params/norm/scale is not in the model" in str(error.value)


def test_not_finite_is_not_saved(tmp_path):
    bad = make_state(1)
    bad.params["norm"]["scale"] = bad.params["norm"]["scale"].at[3].set(jnp.nan)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(FloatingPointError, match="params/norm/scale"):
            checkpoints.save(1, bad, data_state=None)
        assert checkpoints.steps() == []


def test_what_was_not_finite_is_not_restored_whoever_saved_it(tmp_path, caplog, monkeypatch):
    bad = make_state(2)
    bad.params["norm"]["scale"] = bad.params["norm"]["scale"].at[3].set(jnp.inf)
    save(tmp_path, 1)
    honest = digests.of
    with checkpoint.Checkpoints(tmp_path) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(
            digests, "of", lambda x: {n: c | {"finite": True} for n, c in honest(x).items()}
        )
        checkpoints.save(2, bad, data_state={"next": 2})
    assert restore(tmp_path).step == 1
    assert "step 2 rejected: params/norm/scale is not finite" in caplog.text


def test_latest_and_best_are_kept_also_after_reopening(tmp_path):
    metrics = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5}
    for steps in ((1, 2, 3), (4, 5)):
        with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
            for step in steps:
                checkpoints.save(step, make_state(step), data_state=None, metric=metrics[step])
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [2, 4, 5]


def test_saving_does_not_see_later_changes(tmp_path):
    # The step after a save reuses the state's memory while the files are still being written.
    advance = jax.jit(lambda x: jax.tree.map(lambda a: a * 2 + 1, x), donate_argnums=0)
    tree = {f"x{i}": jnp.full((256, 256), float(i)) for i in range(8)}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, data_state=None)
        for _ in range(3):
            tree = advance(tree)
        restored = checkpoints.restore(tree)
    assert all((restored.state[f"x{i}"] == i).all() for i in range(8))


def test_data_state_must_be_json(tmp_path):
    with (
        checkpoint.Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match="data_state and extra must be JSON"),
    ):
        checkpoints.save(1, make_state(1), data_state={"x": object()})


def test_load_needs_no_model(tmp_path):
    save(tmp_path, 1, 2)
    loaded = checkpoint.load(tmp_path, step=1)
    assert loaded.step == 1
    np.testing.assert_array_equal(
        loaded.state["params"]["dense"]["kernel"], make_state(1).params["dense"]["kernel"]
    )
    flip_bit(tmp_path, 2)
    with pytest.raises(checkpoint.CheckpointError, match="step 2"):
        checkpoint.load(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="has no step 7"):
        checkpoint.load(tmp_path, step=7)
    with pytest.raises(checkpoint.CheckpointError, match="no folder"):
        checkpoint.load(tmp_path / "none")


def test_meta_is_plain_json(tmp_path):
    save(tmp_path, 1)
    meta = json.loads((tmp_path / "1" / "meta" / "metadata").read_text())
    assert meta["arrays"]["params/dense/kernel"]["shape"] == [64, 48]
