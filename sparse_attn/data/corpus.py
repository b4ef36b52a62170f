"""Which text a run trains on: found in a fixed order, without duplicates, with a sha256.

Order: the path given; a folder prepared earlier; Debian packages that hold text; the standard
library of the running Python, which is always there. A path that is missing or empty is an error:
a run never trains on something else than what was asked for.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sparse_attn.data import manifest, sources

# A longer file would make the validation share a matter of luck, so it is cut into chunks.
_LARGEST_SHARE = 1 / 40
_CHUNK_BYTES = (256, 64 * 1024)  # smallest (of a tiny corpus), largest


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """Bytes `start:stop` of one source item; `digest` is the sha256 of exactly these bytes."""

    name: str
    item: sources.Item
    start: int
    stop: int
    digest: str

    @property
    def num_bytes(self) -> int:
        """Length in bytes."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A list of documents that can be read again, and what identifies their text.

    Attributes:
      name: for people, e.g. `Python 3.13.0 standard library`.
      source: `path`, `prepared`, `debian` or `stdlib`.
      root: the path it came from; None for Debian and stdlib.
      documents: in order; empty when the corpus is a prepared folder, which holds them itself.
      num_documents, num_bytes: totals after duplicates went out.
      sha256: over the documents' own sha256 values in order, so over content, borders and order.
      left_out: reason -> number of files, e.g. duplicates.
      prepared_dir: the prepared folder that this corpus is, or None.
    """

    name: str
    source: str
    root: str | None
    documents: tuple[Document, ...] = dataclasses.field(repr=False)
    num_documents: int
    num_bytes: int
    sha256: str
    left_out: dict[str, int]
    prepared_dir: pathlib.Path | None = None

    def describe(self) -> str:
        """Gives the line to print before training."""
        left_out = ", ".join(f"{n:,} {why}" for why, n in self.left_out.items() if n)
        return (
            f"data: {self.name}, {self.num_bytes:,} bytes, {self.num_documents:,} documents, "
            f"sha256 {self.sha256}" + (f" (left out: {left_out})" if left_out else "")
        )

    def to_json(self) -> dict[str, Any]:
        """Gives what a run folder stores: everything but the documents."""
        return {
            "name": self.name,
            "source": self.source,
            "root": self.root,
            "num_documents": self.num_documents,
            "num_bytes": self.num_bytes,
            "sha256": self.sha256,
            "left_out": dict(self.left_out),
        }

    def read(self, documents: Iterable[Document] | None = None) -> Iterator[tuple[Document, bytes]]:
        """Yields documents (all, or those given) with their bytes, one source file at a time.

        Raises:
          ValueError: a file changed since the corpus was resolved, or the corpus is a prepared
            folder (`text` reads those).
        """
        self._check_has_documents()
        item, content = None, b""
        for document in self.documents if documents is None else documents:
            if document.item != item:
                item, content = document.item, sources.read(document.item)
            text = content[document.start : document.stop]
            if hashlib.sha256(text).hexdigest() != document.digest:
                raise ValueError(f"{document.item.path} changed while it was being read; run again")
            yield document, text

    def split(self, validation_share: float = 0.05) -> dict[str, tuple[Document, ...]]:
        """Divides whole documents into `train` and `validation`, by content alone.

        Validation takes documents in the order of their sha256 until it holds the share of bytes:
        neither names nor order matter, and a document added elsewhere moves at most a few others.

        Raises:
          ValueError: the share is not between 0 and 1, there is too little text for two parts, or
            the corpus is a prepared folder, which is split already.
        """
        self._check_has_documents()
        if not 0 < validation_share < 1:
            raise ValueError(f"validation_share={validation_share} must be between 0 and 1")
        wanted = validation_share * self.num_bytes
        chosen: set[str] = set()
        held = 0
        for document in sorted(self.documents, key=lambda d: d.digest):
            if held >= wanted:
                break
            chosen.add(document.digest)
            held += document.num_bytes
        parts = {
            "train": tuple(d for d in self.documents if d.digest not in chosen),
            "validation": tuple(d for d in self.documents if d.digest in chosen),
        }
        if not all(parts.values()):
            raise ValueError(
                f"{self.name}: {self.num_bytes} bytes in {self.num_documents} documents "
                f"must be enough for train and validation (validation_share={validation_share})"
            )
        return parts

    def _check_has_documents(self) -> None:
        if self.prepared_dir is not None:
            raise ValueError(
                f"{str(self.prepared_dir)!r} is prepared and split already; read it with `text`"
            )


def resolve(
    path: str | os.PathLike[str] | None = None,
    *,
    prepared_dir: str | os.PathLike[str] | None = None,
    max_bytes: int | None = None,
) -> Corpus:
    """Finds the text to train on; what comes first in this list is taken.

    1. `path`: a text file (`.gz` is unpacked), a folder (all its text files), array_record files
       (one document a record) or a TFDS folder (its train split).
    2. `prepared_dir`: a folder that `prepare.prepare` returned.
    3. Debian packages that hold text, all that are installed.
    4. The standard library of the running Python.

    `max_bytes` keeps whole documents only, chosen by content as in `Corpus.split`.

    Raises:
      FileNotFoundError: `path` or `prepared_dir` does not exist.
      ValueError: there is no text in `path`, or a prepared folder is damaged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in "ab":
    ...         _ = pathlib.Path(folder, name + ".txt").write_text(f"the text of {name}")
    ...     found = resolve(folder)
    >>> found.source, found.num_documents, found.num_bytes
    ('path', 2, 26)
    """
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes={max_bytes} must be at least 1, or None for all")
    if path is not None:
        root = pathlib.Path(path)
        if (root / manifest.NAME).is_file() and (root / manifest.TFDS_INFO).is_file():
            return _prepared(root, max_bytes)
        items = sources.list_path(root)
        name = root.resolve().name or str(root)
        found = _scan(items, name=name, source="path", root=str(path), max_bytes=max_bytes)
        if not found.documents:
            raise ValueError(
                f"path={str(path)!r} must hold text; every file in it is empty or binary"
            )
        return found
    if prepared_dir is not None:
        root = pathlib.Path(prepared_dir)
        if not root.exists():
            raise FileNotFoundError(f"prepared_dir={str(root)!r} must be a folder that exists")
        return _prepared(root, max_bytes)
    packages = sources.list_debian()
    if packages:
        items = [item for package in packages.values() for item in package]
        name = f"Debian packages {', '.join(packages)}"
        found = _scan(items, name=name, source="debian", root=None, max_bytes=max_bytes)
        if found.documents:
            return found
    name = sources.stdlib_name()
    items = sources.list_stdlib()
    found = _scan(items, name=name, source="stdlib", root=None, max_bytes=max_bytes)
    if not found.documents:
        raise ValueError(f"no text in {sources.stdlib_root()}; path must name the data to train on")
    return found


def _prepared(root: pathlib.Path, max_bytes: int | None) -> Corpus:
    content = manifest.read(root)["corpus"]
    if max_bytes is not None and max_bytes < content["num_bytes"]:
        raise ValueError(
            f"max_bytes={max_bytes} must be None for a prepared folder; "
            f"{str(root)!r} holds {content['num_bytes']} bytes"
        )
    fields = {**content, "source": "prepared", "root": str(root)}
    return Corpus(documents=(), prepared_dir=root, **fields)


def _scan(
    items: Sequence[sources.Item],
    *,
    name: str,
    source: str,
    root: str | None,
    max_bytes: int | None,
) -> Corpus:
    """Reads every item once: hashes it, drops what is empty, binary or there already, cuts."""
    left_out = {"empty": 0, "binary": 0, "duplicates": 0, "beyond max_bytes": 0}
    documents: list[Document] = []
    seen: set[str] = set()
    # One file named by the user is trained on as it is; a folder may hold images beside its text.
    skip_binary = len(items) > 1 and all(item.record is None for item in items)
    for item in items:
        content = sources.read(item)
        if not content:
            left_out["empty"] += 1
        elif skip_binary and sources.looks_binary(content):
            left_out["binary"] += 1
        else:
            document = _document(item, content, 0, len(content), item.name)
            if document.digest in seen:
                left_out["duplicates"] += 1
            else:
                seen.add(document.digest)
                documents.append(document)
    documents, repeated = _cut_long(documents)
    left_out["duplicates"] += repeated
    if documents and max_bytes is not None:
        kept = _limit(documents, max_bytes)
        left_out["beyond max_bytes"] = len(documents) - len(kept)
        documents = kept
    total = hashlib.sha256()
    for document in documents:
        total.update(bytes.fromhex(document.digest))
    return Corpus(
        name=name,
        source=source,
        root=root,
        documents=tuple(documents),
        num_documents=len(documents),
        num_bytes=sum(d.num_bytes for d in documents),
        sha256=total.hexdigest(),
        left_out=left_out,
    )


def _document(item: sources.Item, content: bytes, start: int, stop: int, name: str) -> Document:
    digest = hashlib.sha256(content if stop - start == len(content) else content[start:stop])
    return Document(name=name, item=item, start=start, stop=stop, digest=digest.hexdigest())


def _cut_long(documents: list[Document]) -> tuple[list[Document], int]:
    """Cuts documents that hold more than their share of the corpus, at ends of paragraphs."""
    total = sum(d.num_bytes for d in documents)
    smallest, largest = _CHUNK_BYTES
    chunk = min(max(total // 64, smallest), largest)
    longest = max(int(total * _LARGEST_SHARE), chunk)
    if all(d.num_bytes <= longest for d in documents):
        return documents, 0
    seen = {d.digest for d in documents if d.num_bytes <= longest}
    result: list[Document] = []
    repeated = 0
    for document in documents:
        if document.num_bytes <= longest:
            result.append(document)
            continue
        content = sources.read(document.item)
        start = 0
        while start < len(content):
            stop = _cut_at(content, start, chunk)
            piece = _document(document.item, content, start, stop, f"{document.name}#{start:012d}")
            start = stop
            if piece.digest in seen:
                repeated += 1
            else:
                seen.add(piece.digest)
                result.append(piece)
    return result, repeated


def _cut_at(content: bytes, start: int, chunk: int) -> int:
    """Finds the end of a chunk: after a blank line, else a line, in its second half, else hard."""
    stop = start + chunk
    if stop >= len(content):
        return len(content)
    for mark in (b"\n\n", b"\n"):
        found = content.rfind(mark, start + chunk // 2, stop)
        if found >= 0:
            return found + len(mark)
    return stop


def _limit(documents: list[Document], max_bytes: int) -> list[Document]:
    """Keeps documents that fit, smallest sha256 first, in their old order."""
    kept: set[str] = set()
    held = 0
    for document in sorted(documents, key=lambda d: d.digest):
        if held + document.num_bytes <= max_bytes:
            kept.add(document.digest)
            held += document.num_bytes
    if not kept:
        raise ValueError(
            f"max_bytes={max_bytes} must be at least {min(d.num_bytes for d in documents)}, "
            "the shortest document"
        )
    return [d for d in documents if d.digest in kept]
