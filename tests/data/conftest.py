"""A small prepared folder, made once: many documents of odd sizes, some of them not UTF-8."""

import pathlib
import random

import pytest

from sparse_attn.data import corpus, prepare, sources


def write_documents(folder: pathlib.Path, count: int = 60, seed: int = 0) -> dict[str, bytes]:
    """Writes documents whose lines are all different, so that windows can be told apart."""
    draw = random.Random(seed)
    written = {}
    for number in range(count):
        length = draw.choice([1, 2, 7, 60, 400, 900])
        text = b"".join(b"%d:%d:%d\n" % (seed, number, line) for line in range(length))[:length]
        written[f"sub{number % 3}/doc{number:03d}.txt"] = text
    # Every byte value but NUL (which would make the file look binary), and broken UTF-8.
    written["bytes.bin.txt"] = bytes(range(1, 256)) * 3 + b"\xff\xfe\xc3"
    for name, text in written.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return written


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    write_documents(folder)
    return folder


@pytest.fixture(scope="session")
def prepared(documents, tmp_path_factory):
    return prepare.prepare(corpus.resolve(documents), tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """An empty machine: no Debian package, and a standard library of our own making."""
    debian, stdlib = tmp_path / "root", tmp_path / "python"
    debian.mkdir()
    stdlib.mkdir()
    monkeypatch.setattr(sources, "DEBIAN_ROOT", debian)
    monkeypatch.setattr(sources, "stdlib_root", lambda: stdlib)
    return debian, stdlib
