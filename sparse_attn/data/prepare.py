"""Writes a corpus once as a TFDS data set: array_record, split, indexed; TensorFlow is not used."""

import contextlib
import fcntl
import io
import logging
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from sparse_attn.data import corpus as corpus_lib
from sparse_attn.data import manifest

# A reader unpacks whole records, so a long document is stored in several: about 40 us each.
PIECE_BYTES = 16 * 1024
SPLITS = ("train", "validation")


class TextCorpus(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of a corpus: one record is a document or a piece of one, as bytes."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Documents as bytes, split by content."}

    name = manifest.DATASET

    def __init__(
        self, *, corpus: corpus_lib.Corpus, validation_share: float, **kwargs: Any
    ) -> None:
        self._corpus = corpus
        self._validation_share = validation_share
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        # TFDS's own helper derives the description from files beside the module; there are none.
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._corpus.describe(),
            features=tfds.features.FeaturesDict(
                {
                    "name": tfds.features.Text(),
                    "document": np.int64,  # counts documents of the split
                    "text": tfds.features.Text(),  # any bytes, not only UTF-8
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        parts = self._corpus.split(self._validation_share)
        return {split: self._generate_examples(parts[split]) for split in SPLITS}

    def _generate_examples(self, documents: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        key = 0
        for number, (document, text) in enumerate(self._corpus.read(documents)):
            for start in range(0, len(text), PIECE_BYTES):
                piece = text[start : start + PIECE_BYTES]
                yield key, {"name": document.name, "document": number, "text": piece}
                key += 1


def prepare(
    corpus: corpus_lib.Corpus,
    data_dir: str | os.PathLike[str],
    *,
    validation_share: float | None = None,
) -> pathlib.Path:
    """Makes sure that the corpus lies prepared below `data_dir` and returns its folder.

    The folder is named by the sha256, and appears complete or not at all; one that is damaged or
    half written is made anew. Any number of processes may call this at the same time.
    `validation_share=None` means 0.05, or whatever a corpus that is prepared already was split by.

    Raises:
      ValueError: too little text for two splits, or the corpus is a prepared folder that is
        damaged or was split by another share.
    """
    if corpus.prepared_dir is not None:
        held = manifest.verify(corpus.prepared_dir)["validation_share"]
        if validation_share not in (None, held):
            raise ValueError(
                f"validation_share={validation_share} must be {held} or None, because "
                f"{str(corpus.prepared_dir)!r} was prepared with {held}"
            )
        return corpus.prepared_dir
    share = 0.05 if validation_share is None else validation_share
    corpus.split(share)  # fails before anything is written
    parent = pathlib.Path(data_dir).absolute() / f"text-{corpus.sha256[:16]}-{share:g}"
    folder = parent / manifest.DATASET / str(TextCorpus.VERSION)
    if _is_complete(folder, corpus):
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    with open(parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system frees it when a process dies
        if _is_complete(folder, corpus):
            return folder  # another process was faster
        for left_behind in parent.glob(".incomplete-*"):
            shutil.rmtree(left_behind)
        if folder.exists():
            logging.warning("%s is damaged or half written; preparing it again", folder)
        shutil.rmtree(folder.parent, ignore_errors=True)
        work = parent / f".incomplete-{uuid.uuid4().hex}"
        try:
            _write(corpus, work, share).parent.rename(folder.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def _is_complete(folder: pathlib.Path, corpus: corpus_lib.Corpus) -> bool:
    try:
        return manifest.verify(folder)["corpus"]["sha256"] == corpus.sha256
    except (ValueError, OSError, KeyError, TypeError, AttributeError):
        return False  # JSON of any shape may stand in a damaged file


def _write(
    corpus: corpus_lib.Corpus, data_dir: pathlib.Path, validation_share: float
) -> pathlib.Path:
    """Writes data set, index and manifest into `data_dir`; returns the data set's folder in it."""
    builder = TextCorpus(
        corpus=corpus, validation_share=validation_share, data_dir=os.fspath(data_dir)
    )
    # TFDS prints progress bars that say nothing about training.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare()
    folder = pathlib.Path(builder.data_dir)
    splits = {split: _index(folder, split) for split in SPLITS}
    written = sum(counts["bytes"] for counts in splits.values())
    if written != corpus.num_bytes:
        raise ValueError(f"{folder} must hold {corpus.num_bytes} bytes and holds {written}")
    manifest.write(
        folder, corpus=corpus.to_json(), validation_share=validation_share, splits=splits
    )
    return folder


def _index(folder: pathlib.Path, split: str) -> dict[str, int]:
    """Reads back what was written and notes where each piece begins in the stream of tokens."""
    lengths, documents = [], []
    for record in tfds.builder_from_directory(folder).as_data_source(split=split):
        lengths.append(len(record["text"]))
        documents.append(int(record["document"]))
    document = np.asarray(documents, np.int64)
    changes = np.diff(document) != 0
    opens = np.concatenate([[True], changes])
    closes = np.concatenate([changes, [True]])
    offsets = np.zeros(len(lengths) + 1, np.int64)
    # BOS stands before the first piece of a document, EOS after its last.
    np.cumsum(np.asarray(lengths, np.int64) + opens + closes, out=offsets[1:])
    offsets_path, opens_path = manifest.index_paths(folder, split)
    np.save(offsets_path, offsets)
    np.save(opens_path, opens)
    return {
        "documents": int(opens.sum()),
        "bytes": sum(lengths),
        "pieces": len(lengths),
        "tokens": int(offsets[-1]),
    }
