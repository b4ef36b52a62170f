"""Where text lies on a machine: lists of files or records, and how to read one of them as bytes."""

import dataclasses
import functools
import gzip
import os
import pathlib
import re
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from sparse_attn.data import manifest

DEBIAN_ROOT = pathlib.Path("/")
# package -> where its text lies. One form of each text only: the HTML copies repeat it.
DEBIAN_PACKAGES: dict[str, tuple[str, ...]] = {
    "anarchism": ("usr/share/doc/anarchism/markdown/*.md*",),
    "dict-foldoc": ("usr/share/dictd/foldoc.dict.dz",),
    "dict-gcide": ("usr/share/dictd/gcide.dict.dz",),
    "linux-doc": ("usr/share/doc/linux-doc*/Documentation/**/*.rst*",),
    "python-doc": ("usr/share/info/python3*.info*",),
}
# Tests repeat themselves and hold binary-like text; the rest is other packages or this machine.
STDLIB_LEFT_OUT = re.compile(
    r"(^|/)(tests?|idle_test|site-packages|dist-packages|lib-dynload|__pycache__|config-[^/]*)/"
    r"|(^|/)_sysconfigdata[^/]*$"
)
STDLIB_SUFFIXES = (".py", ".rst", ".txt")
_ARRAY_RECORD = re.compile(r"\.array_?record(-\d+-of-\d+)?$")
_GZIP_SUFFIXES = (".gz", ".dz")  # dictzip is gzip with an index in the header


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One file, or one record of a record file or TFDS folder; `name` is unique in its list."""

    name: str
    path: str
    record: int | None = None


def stdlib_root() -> pathlib.Path:
    """Gives the folder of the running Python's standard library."""
    return pathlib.Path(sysconfig.get_paths()["stdlib"])


def stdlib_name() -> str:
    """Names the running Python, because its text differs from version to version."""
    return "Python {}.{}.{} standard library".format(*sys.version_info[:3])


def list_stdlib() -> list[Item]:
    """Lists code and documents of the standard library, without its tests."""
    root = stdlib_root()
    found = _walk(root) if root.is_dir() else []
    return [
        item
        for item in found
        if item.name.endswith(STDLIB_SUFFIXES) and not STDLIB_LEFT_OUT.search(item.name)
    ]


def list_debian() -> dict[str, list[Item]]:
    """Lists the text of each Debian package of the table that is installed."""
    found = {}
    for package, patterns in DEBIAN_PACKAGES.items():
        paths = sorted(p for pattern in patterns for p in DEBIAN_ROOT.glob(pattern) if p.is_file())
        if paths:
            found[package] = [
                Item(f"{package}/{path.relative_to(DEBIAN_ROOT).as_posix()}", str(path))
                for path in paths
            ]
    return found


def list_path(path: pathlib.Path) -> list[Item]:
    """Lists what a user's path holds: text files, array_record files or a TFDS folder.

    Raises:
      FileNotFoundError: there is no such path.
      ValueError: the path is a piece of, or holds, prepared data sets instead of being one.
    """
    if not path.exists():
        raise FileNotFoundError(f"path={str(path)!r} must be a file or a folder that exists")
    if path.is_file():
        if not _ARRAY_RECORD.search(path.name):
            return [Item(path.name, str(path))]
        if (path.parent / manifest.TFDS_INFO).exists():
            raise ValueError(
                f"path={str(path)!r} must not be one shard of a TFDS data set; "
                f"give its folder {str(path.parent)!r}"
            )
        return _records([path])
    if not path.is_dir():
        raise ValueError(f"path={str(path)!r} must be a regular file or a folder")
    if (path / manifest.TFDS_INFO).exists():
        return [
            Item(f"train[{i:09d}]", str(path), i) for i in range(len(_tfds_source(str(path))[0]))
        ]
    records = sorted(p for p in path.iterdir() if _ARRAY_RECORD.search(p.name))
    if records:
        return _records(records)
    items = _walk(path)
    inner = [item for item in items if pathlib.PurePath(item.name).name == manifest.TFDS_INFO]
    if inner:
        raise ValueError(
            f"path={str(path)!r} must not hold prepared data sets among its files; "
            f"give one of them, such as {os.path.dirname(inner[0].path)!r}"
        )
    return items


def read(item: Item) -> bytes:
    """Reads the whole content of one item; `.gz` and `.dz` files are unpacked.

    Raises:
      ValueError: a compressed file is damaged.
    """
    if item.record is not None:
        if os.path.isdir(item.path):
            source, feature = _tfds_source(item.path)
            value = source[item.record][feature]
            return value.encode() if isinstance(value, str) else bytes(value)
        return bytes(_record_source(item.path)[item.record])
    with open(item.path, "rb") as file:
        raw = file.read()
    if not item.path.endswith(_GZIP_SUFFIXES):
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{item.path} must be a complete gzip file: {error}") from error


def looks_binary(content: bytes) -> bool:
    """Says whether a NUL byte is among the first 8 KiB (the test that git uses)."""
    return b"\0" in content[:8192]


def _walk(root: pathlib.Path) -> list[Item]:
    """Lists the files below a folder by name; hidden ones and Python's caches are not text."""
    items = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [s for s in subfolders if not s.startswith(".") and s != "__pycache__"]
        for file in files:
            path = pathlib.Path(folder, file)
            if not file.startswith(".") and path.is_file():
                items.append(Item(path.relative_to(root).as_posix(), str(path)))
    return sorted(items, key=lambda item: item.name)


def _records(paths: Iterable[pathlib.Path]) -> list[Item]:
    return [
        Item(f"{path.name}[{i:09d}]", str(path), i)
        for path in paths
        for i in range(len(_record_source(str(path))))
    ]


@functools.lru_cache(maxsize=64)
def _record_source(path: str) -> Any:
    # Imported here: text files, the usual case, do not need it.
    from array_record.python import array_record_data_source

    return array_record_data_source.ArrayRecordDataSource([path])


@functools.lru_cache(maxsize=8)
def _tfds_source(path: str) -> tuple[Sequence[Any], str]:
    """Opens the train split of any TFDS folder and finds its text feature.

    Only `train` is read: a test split must stay unseen, and the validation share is ours.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(path)
    if builder.name == manifest.DATASET:
        raise ValueError(f"path={path!r} must have a {manifest.NAME}; prepare it again")
    if "train" not in builder.info.splits:
        raise ValueError(
            f"path={path!r} must have a split 'train'; it has {sorted(builder.info.splits)}"
        )
    texts = [k for k, f in builder.info.features.items() if isinstance(f, tfds.features.Text)]
    if "text" not in texts and len(texts) != 1:
        raise ValueError(
            f"path={path!r} must have a text feature named 'text', or exactly one; it has {texts}"
        )
    return builder.as_data_source(split="train"), "text" if "text" in texts else texts[0]
