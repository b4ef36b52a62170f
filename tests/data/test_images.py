"""Images: fixed splits, an order that is a function of the seed, the IDX format."""

import gzip
import hashlib
import itertools
import json
import struct

import numpy as np
import pytest

from sparse_attn.data import images


def test_digits_are_the_same_everywhere():
    data = images.load("digits")
    assert data.sha256 == "81062d283864bc34e98be014106f71d4ec98f36a2dc3e7ef20307cb3f5fc5510"
    assert data.train.images.max() == 255
    for split in (data.train, data.test):
        assert split.images.shape[1:] == images.source("digits").image_shape
        assert len(set(split.labels)) == images.source("digits").num_classes
    train, test = (
        {hashlib.sha256(x.tobytes()).digest() for x in split.images}
        for split in (data.train, data.test)
    )
    assert not train & test
    assert data.to_json()["num_train"] + data.to_json()["num_test"] == 1797
    assert "1,438 train, 359 test" in data.describe()


def test_a_moving_digit_moves_in_its_direction():
    data = images.load("moving_digits")
    assert data.train.images.shape[1:] == images.source("moving_digits").image_shape
    counts = np.bincount(data.train.labels, minlength=4)
    assert counts.min() > 0.2 * counts.sum()  # Of four directions.
    for video, label in zip(data.test.images[:20], data.test.labels[:20], strict=True):
        for before, after in itertools.pairwise(video):
            moved = np.roll(before, images.DIRECTIONS[label], (0, 1))
            np.testing.assert_array_equal(after, moved)


def test_an_epoch_is_every_image_once_and_epochs_differ():
    data = images.load("digits")
    digests = {}
    for i, image in enumerate(data.train.images.astype(np.float32) / 127.5 - 1):
        digests.setdefault(image.tobytes(), []).append(i)
    seen = []
    batches = images.Batches(data, batch_size=719, seed=0)  # Half an epoch.
    for batch in (next(batches) for _ in range(4)):
        assert batch["inputs"].dtype == batch["weights"].dtype == np.float32
        seen.append([digests[x.tobytes()][0] for x in batch["inputs"]])
        np.testing.assert_array_equal(batch["targets"], data.train.labels[seen[-1]])
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3])
    assert seen[0] != seen[2]
    other = next(images.Batches(data, batch_size=719, seed=1))
    assert (other["targets"] != data.train.labels[seen[0]]).any()


def test_a_saved_place_goes_on_exactly():
    data = images.load("digits")
    batches = images.Batches(data, batch_size=100, seed=3)
    for _ in range(17):  # Into the second epoch, across its border.
        next(batches)
    state = batches.get_state()
    resumed = images.Batches(data, batch_size=100, seed=3)
    resumed.set_state(json.loads(json.dumps(state)))
    got = next(resumed)
    for name, expected in next(batches).items():
        np.testing.assert_array_equal(got[name], expected)
    with pytest.raises(ValueError, match=r"the data order cannot be resumed: it was .*'seed': 3"):
        images.Batches(data, batch_size=100, seed=4).set_state(state)


def test_evaluation_is_every_test_image_once():
    data = images.load("digits")
    batches = images.evaluation_batches(data, batch_size=100)
    assert [batch["weights"].sum() for batch in batches] == [100, 100, 100, 59]
    targets = np.concatenate([b["targets"][b["weights"] == 1] for b in batches])
    np.testing.assert_array_equal(targets, data.test.labels)


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_fashion_mnist_is_read_from_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "FASHION_MNIST", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="install Debian's package dataset-fashion-mnist"):
        images.source("fashion_mnist").read()
    monkeypatch.setattr(images, "FASHION_MNIST", tmp_path)
    draw = np.random.default_rng(0)
    expected = {}
    for part, count in (("train", 5), ("t10k", 3)):
        pixels = draw.integers(0, 256, (count, 28, 28), np.uint8)
        labels = draw.integers(0, 10, count).astype(np.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", pixels)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
        expected[part] = pixels, labels
    _, *splits = images.source("fashion_mnist").read()
    for split, (pixels, labels) in zip(splits, expected.values(), strict=True):
        assert split.images.shape[1:] == images.source("fashion_mnist").image_shape
        np.testing.assert_array_equal(split.images[..., 0], pixels)
        np.testing.assert_array_equal(split.labels, labels)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", pixels)
    with pytest.raises(ValueError, match="must be an IDX file of bytes with 1 axes"):
        images.source("fashion_mnist").read()


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"data.name='mnist' must be one of 'digits'"):
        images.load("mnist")
    with pytest.raises(ValueError, match=r"batch_size=2000 must be in 1..1438"):
        images.Batches(images.load("digits"), batch_size=2000, seed=0)
    with pytest.raises(ValueError, match="seed=-1 must not be negative"):
        images.Batches(images.load("digits"), batch_size=2, seed=-1)
