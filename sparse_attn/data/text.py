"""Batches of text from a prepared folder: random access, one global order, exact resume.

Step t of a run takes windows `order[t*batch_size : (t+1)*batch_size]`, where `order` is the list of
windows shuffled anew each epoch, a function of the seed alone. A process takes its rows of that
batch, so the order is the same for every number of processes.

Bits per byte: `sum(weights * loss) / log(2) / sum(num_bytes(batch))`, both sums over all batches,
with the loss in nats. Predicting the end of a document (EOS) costs bits but is no byte.
"""

import functools
import os
import pathlib
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float, Int, UInt16

from sparse_attn.data import manifest, packing, tokenizer

ORDER = 1  # raised when the same seed would give another order of windows


class TokenStream:
    """The tokens of one split as if they were one array; pieces are read when they are needed.

    Attributes:
      num_tokens: bytes and marks of the split.
    """

    def __init__(self, prepared_dir: str | os.PathLike[str], *, split: str) -> None:
        """Opens a split.

        Raises:
          ValueError: the folder is not prepared or damaged, or there is no such split.
        """
        folder = pathlib.Path(prepared_dir)
        content = _manifest(folder, split)
        offsets, opens = manifest.index_paths(folder, split)
        self._offsets = np.load(offsets, mmap_mode="r", allow_pickle=False)
        self._opens = np.load(opens, mmap_mode="r", allow_pickle=False)
        self._records = tfds.builder_from_directory(folder).as_data_source(split=split)
        self.num_tokens: int = content["splits"][split]["tokens"]
        if len(self._records) != len(self._opens) or self._offsets[-1] != self.num_tokens:
            raise ValueError(
                f"prepared_dir={str(folder)!r}: index and records of split {split!r} must agree; "
                "prepare it again"
            )
        # 2048 pieces are at most 64 MiB of tokens: small corpora are unpacked once.
        self._piece = functools.lru_cache(maxsize=2048)(self._read_piece)

    def read(self, start: int, stop: int) -> UInt16[np.ndarray, "T"]:
        """Gives tokens `start:stop`, which must lie within the stream.

        Raises:
          ValueError: the range leaves the stream.
        """
        if not 0 <= start < stop <= self.num_tokens:
            raise ValueError(f"range {start}:{stop} must lie within 0:{self.num_tokens}")
        first = int(np.searchsorted(self._offsets, start, side="right")) - 1
        last = int(np.searchsorted(self._offsets, stop, side="left"))
        pieces = [self._piece(index) for index in range(first, last)]
        tokens = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        skipped = int(self._offsets[first])
        return tokens[start - skipped : stop - skipped]

    def windows(self, ids: Int[np.ndarray, "B"], *, context: int) -> UInt16[np.ndarray, "B T1"]:
        """Gives windows of context + 1 tokens; what lies behind the end is PAD, and so is id -1."""
        tokens = np.full((len(ids), context + 1), tokenizer.PAD, np.uint16)
        for row, window in zip(tokens, ids, strict=True):
            if window >= 0:
                start = int(window) * context
                stop = min(start + context + 1, self.num_tokens)
                row[: stop - start] = self.read(start, stop)
        return tokens

    def _read_piece(self, index: int) -> UInt16[np.ndarray, "T"]:
        text = np.frombuffer(self._records[index]["text"], np.uint8)
        marked = int(self._offsets[index + 1] - self._offsets[index]) - len(text)
        opens = int(self._opens[index])
        tokens = np.full(len(text) + marked, tokenizer.EOS, np.uint16)
        tokens[:opens] = tokenizer.BOS
        tokens[opens : opens + len(text)] = text
        return tokens


def fingerprint(
    prepared_dir: str | os.PathLike[str],
    *,
    split: str,
    context: int,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    repeat: bool = True,
) -> dict[str, Any]:
    """Gives everything the order of batches depends on, for a checkpoint to carry (JSON).

    The number of processes is not in it: a run may be resumed on another one.
    """
    content = _manifest(pathlib.Path(prepared_dir), split)
    return {
        "corpus": content["corpus"]["sha256"],
        "validation_share": content["validation_share"],
        "split": split,
        "context": context,
        "batch_size": batch_size,
        "seed": seed,
        "shuffle": shuffle,
        "repeat": repeat,
        "order": ORDER,
    }


def loader(
    prepared_dir: str | os.PathLike[str],
    *,
    split: str,
    context: int,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    repeat: bool = True,
    shard_index: int = 0,
    shard_count: int = 1,
) -> grain.DatasetIterator:
    """Iterates over batches (see `packing.pack`) as process `shard_index` of `shard_count` does.

    `batch_size` counts the rows of all processes together; this one gets rows
    `[shard_index * b, (shard_index + 1) * b)` with `b = batch_size / shard_count`. Without `repeat`
    there is one epoch, and the last batch is filled with rows of weight 0. `get_state` is small
    and JSON; `set_state` goes on with exactly the next batch.

    Raises:
      ValueError: an argument is out of range, the context is longer than the split, the folder is
        not prepared; from `set_state`, the state belongs to other data or settings.
    """
    _check_positive(context=context, batch_size=batch_size, shard_count=shard_count)
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index={shard_index} must be in 0..{shard_count - 1}")
    if batch_size % shard_count:
        raise ValueError(f"batch_size={batch_size} must be a multiple of shard_count={shard_count}")
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative")
    stream = TokenStream(prepared_dir, split=split)
    if context >= stream.num_tokens:
        raise ValueError(
            f"context={context} must be less than the {stream.num_tokens} tokens of split {split!r}"
        )
    order = grain.MapDataset.range(packing.num_windows(stream.num_tokens, context))
    if shuffle:
        # Grain adds the epoch to its seed; spread out, seeds 0 and 1 share no epoch.
        order = order.shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
    if repeat:
        order = order.repeat()
    rows = batch_size // shard_count
    mine = slice(shard_index * rows, (shard_index + 1) * rows)

    def read(ids: np.ndarray) -> packing.Batch:
        filled = np.full(batch_size, -1, np.int64)
        filled[: len(ids)] = ids
        return packing.pack(stream.windows(filled[mine], context=context))

    # An endless stream has no remainder, and Grain cannot round its length up for batch size 1.
    batches = order.batch(batch_size, drop_remainder=repeat).map(read)
    # Reading is far faster than training: two threads hide it, eight batches are enough ahead.
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
    expected = fingerprint(
        prepared_dir,
        split=split,
        context=context,
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        repeat=repeat,
    )
    return _Resumable(iter(batches.to_iter_dataset(read_options=options)), expected)


def num_batches(
    prepared_dir: str | os.PathLike[str], *, split: str, context: int, batch_size: int
) -> int:
    """Counts the batches of one epoch, the last one possibly filled up."""
    _check_positive(context=context, batch_size=batch_size)
    tokens = _manifest(pathlib.Path(prepared_dir), split)["splits"][split]["tokens"]
    return -(-packing.num_windows(tokens, context) // batch_size)


def num_bytes(batch: dict[str, Any]) -> Float[Any, ""]:
    """Counts the bytes that a batch is scored on: what a loss is divided by for bits per byte."""
    return (batch["weights"] * (batch["targets"] < tokenizer.BYTES)).sum()


class _Resumable(grain.DatasetIterator):
    """Puts the fingerprint into the state and refuses a state that has another one."""

    def __init__(self, parent: grain.DatasetIterator, expected: dict[str, Any]) -> None:
        super().__init__(parent)
        self._inner = parent
        self._expected = expected

    def __next__(self) -> packing.Batch:
        return next(self._inner)

    def get_state(self) -> dict[str, Any]:
        return {"fingerprint": dict(self._expected), "iterator": self._inner.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        saved = state.get("fingerprint")
        if not isinstance(saved, dict) or "iterator" not in state:
            raise ValueError("state must come from get_state of a text loader")
        differing = [
            f"{name} was {saved.get(name)!r} and is now {self._expected.get(name)!r}"
            for name in sorted({*saved, *self._expected})
            if saved.get(name) != self._expected.get(name)
        ]
        if differing:
            raise ValueError(f"the data order cannot be resumed: {'; '.join(differing)}")
        self._inner.set_state(state["iterator"])


def _manifest(folder: pathlib.Path, split: str) -> dict[str, Any]:
    content = manifest.read(folder)
    if split not in content["splits"]:
        raise ValueError(f"split={split!r} must be one of {sorted(content['splits'])}")
    return content


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
