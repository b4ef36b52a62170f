"""Labelled images that ship in a package, and videos made from them: no download.

digits          scikit-learn's handwritten digits, 8 x 8 pixels, 10 classes, 1797 images
fashion_mnist   clothes, 28 x 28, 10 classes, 70,000 images, of Debian's dataset-fashion-mnist
moving_digits   the digits crossing a torus of 12 x 12 pixels, 8 frames; the class is the direction

Batch t of a run is a function of the seed alone: rows `[t*batch_size, (t+1)*batch_size)` of the
images shuffled anew each epoch.
"""

import dataclasses
import functools
import gzip
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from sparse_attn.data import counted

ORDER = 1  # raised when the same seed would give another order of images
FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")  # where the package puts it
TEST_SHARE = 1 / 5  # of data that come without a split
DIRECTIONS = ((0, 1), (1, 0), (0, -1), (-1, 0))  # right, down, left, up; (rows, columns) a frame

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Split:
    """Images `[N, (frames,) height, width, channels]` and their classes `[N]`."""

    images: UInt8[np.ndarray, "N *image"]
    labels: Int[np.ndarray, "N"]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images to train on and others to test on.

    Attributes:
      name: for people.
      train, test: disjoint.
      sha256: over images and labels in order.
    """

    name: str
    train: Split
    test: Split
    sha256: str

    def describe(self) -> str:
        """Gives the line to print before training."""
        counts = f"{len(self.train.labels):,} train, {len(self.test.labels):,} test"
        return f"data: {self.name}, {counts}, sha256 {self.sha256}"

    def to_json(self) -> dict[str, Any]:
        """Gives what a run folder stores."""
        return {
            "name": self.name,
            "num_train": len(self.train.labels),
            "num_test": len(self.test.labels),
            "num_bytes": self.train.images.nbytes + self.test.images.nbytes,
            "sha256": self.sha256,
        }


@dataclasses.dataclass(frozen=True)
class Source:
    """What is known of a data set before it is read."""

    image_shape: tuple[int, ...]  # (height, width, channels), frames first
    num_classes: int
    read: Callable[[], tuple[str, Split, Split]]


def source(name: str) -> Source:
    """The source of that name.

    Raises:
      ValueError: there is none.

    >>> source("digits").image_shape
    (8, 8, 1)
    """
    if name not in SOURCES:
        raise ValueError(f"data.name={name!r} must be one of {', '.join(map(repr, SOURCES))}")
    return SOURCES[name]


@functools.lru_cache(maxsize=4)
def load(name: str) -> Dataset:
    """Reads a data set.

    Raises:
      ValueError: there is no such source.
      FileNotFoundError: its package is not installed.

    >>> digits = load("digits")
    >>> digits.train.images.shape, digits.test.images.shape
    ((1438, 8, 8, 1), (359, 8, 8, 1))
    """
    title, train, test = source(name).read()
    digest = hashlib.sha256()
    for split in (train, test):
        digest.update(np.ascontiguousarray(split.images))
        digest.update(split.labels.astype(np.uint8))
    return Dataset(title, train, test, digest.hexdigest())


class Batches(counted.Batches):
    """Endless batches of a split; `get_state` is small and JSON, `set_state` goes on exactly.

    A batch has `inputs` (float32, pixels in [-1, 1]), `targets` (int32 `[B]`) and `weights`
    (float32 `[B]`, 1).

    Raises:
      ValueError: an argument is out of range; from `set_state`, the state belongs to other data or
        settings.

    >>> batches = Batches(load("digits"), batch_size=4, seed=0)
    >>> next(batches)["inputs"].shape
    (4, 8, 8, 1)
    """

    def __init__(self, data: Dataset, *, batch_size: int, seed: int):
        if not 1 <= batch_size <= len(data.train.labels):
            raise ValueError(
                f"batch_size={batch_size} must be in 1..{len(data.train.labels)}, the train images"
            )
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative")
        self._split, self._batch_size, self._seed = data.train, batch_size, seed
        super().__init__(
            {"images": data.sha256, "batch_size": batch_size, "seed": seed, "order": ORDER}
        )

    def __next__(self) -> Batch:
        count = len(self._split.labels)
        places = np.arange(self._batch_size) + self._step * self._batch_size
        self._step += 1
        epochs, offsets = np.divmod(places, count)
        rows = [self._order(int(e))[o] for e, o in zip(epochs, offsets, strict=True)]
        return batch_of(self._split, np.array(rows), self._batch_size)

    def _order(self, epoch: int) -> Int[np.ndarray, "N"]:
        return _shuffled(self._seed, epoch, len(self._split.labels))


def evaluation_batches(data: Dataset, *, batch_size: int) -> list[Batch]:
    """The test images once, in order; the last batch is filled with images of weight 0."""
    rows = np.arange(len(data.test.labels))
    return [
        batch_of(data.test, rows[i : i + batch_size], batch_size)
        for i in range(0, len(rows), batch_size)
    ]


def batch_of(split: Split, rows: Int[np.ndarray, "n"], batch_size: int) -> Batch:
    """Some images as a batch, filled up to `batch_size`."""
    filled = np.zeros(batch_size, np.int64)
    filled[: len(rows)] = rows
    return {
        "inputs": split.images[filled].astype(np.float32) / 127.5 - 1,
        "targets": split.labels[filled].astype(np.int32),
        "weights": (np.arange(batch_size) < len(rows)).astype(np.float32),
    }


@functools.lru_cache(maxsize=4)
def _shuffled(seed: int, epoch: int, count: int) -> Int[np.ndarray, "N"]:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _digits() -> tuple[str, Split, Split]:
    # Imported here: text, the usual case, does not need it.
    from sklearn import datasets

    digits = datasets.load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return "scikit-learn digits", *_by_content(images, digits.target)


def _moving_digits() -> tuple[str, Split, Split]:
    _, *splits = _digits()
    return "moving scikit-learn digits", *map(_move, splits)


def _move(split: Split, *, frames: int = 8, side: int = 12) -> Split:
    """Each digit in one of four directions, a pixel per frame, from a place of its own.

    The canvas is a torus, so a single frame says nothing about the direction.
    """
    videos = np.zeros((len(split.labels), frames, side, side, 1), np.uint8)
    directions = np.empty(len(split.labels), np.int64)
    for i, image in enumerate(split.images):
        draw = hashlib.sha256(image.tobytes()).digest()
        directions[i], row, column = draw[0] % len(DIRECTIONS), draw[1] % side, draw[2] % side
        canvas = np.zeros((side, side, 1), np.uint8)
        canvas[: image.shape[0], : image.shape[1]] = image
        down, right = DIRECTIONS[directions[i]]
        for t in range(frames):
            videos[i, t] = np.roll(canvas, (row + t * down, column + t * right), (0, 1))
    return Split(videos, directions)


def _fashion_mnist() -> tuple[str, Split, Split]:
    if not FASHION_MNIST.is_dir():
        raise FileNotFoundError(
            f"data.name='fashion_mnist' needs {FASHION_MNIST}: install Debian's package "
            "dataset-fashion-mnist"
        )
    parts = [
        Split(
            _idx(FASHION_MNIST / f"{part}-images-idx3-ubyte.gz", ndim=3)[..., None],
            _idx(FASHION_MNIST / f"{part}-labels-idx1-ubyte.gz", ndim=1).astype(np.int64),
        )
        for part in ("train", "t10k")
    ]
    return "Fashion-MNIST", *parts


def _idx(path: pathlib.Path, *, ndim: int) -> UInt8[np.ndarray, "..."]:
    """An array of bytes in the IDX format: 0, 0, 8 (bytes), axes, sizes (big-endian), numbers."""
    raw = gzip.decompress(path.read_bytes())
    start = 4 + 4 * ndim
    shape = tuple(np.frombuffer(raw[4:start], ">i4").tolist())
    if raw[:4] != bytes([0, 0, 8, ndim]) or len(raw) - start != np.prod(shape):
        raise ValueError(f"{path} must be an IDX file of bytes with {ndim} axes")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _by_content(images: np.ndarray, labels: np.ndarray) -> tuple[Split, Split]:
    """Train and test by the sha256 of each image: independent of order, equal images together."""
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
    order = sorted(range(len(digests)), key=digests.__getitem__)
    cut = len(order) - int(len(order) * TEST_SHARE + 0.5)
    while digests[order[cut]] == digests[order[cut - 1]]:
        cut += 1
    return tuple(
        Split(images[np.sort(part)], labels[np.sort(part)].astype(np.int64))
        for part in (order[:cut], order[cut:])
    )


SOURCES = {
    "digits": Source((8, 8, 1), 10, _digits),
    "fashion_mnist": Source((28, 28, 1), 10, _fashion_mnist),
    "moving_digits": Source((8, 12, 12, 1), len(DIRECTIONS), _moving_digits),
}
