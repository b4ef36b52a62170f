"""The file that says a prepared folder is whole: what the corpus was, and every file's sha256."""

import hashlib
import json
import pathlib
from typing import Any

FORMAT = 1
NAME = "corpus.json"
DATASET = "text_corpus"  # name of the TFDS data set that `prepare` writes
TFDS_INFO = "dataset_info.json"  # what marks a folder as a TFDS data set


def index_paths(folder: pathlib.Path, split: str) -> tuple[pathlib.Path, pathlib.Path]:
    """Names the index of a split: token offsets of its pieces, and which pieces open a document."""
    return folder / f"{split}-offsets.npy", folder / f"{split}-opens.npy"


def write(
    folder: pathlib.Path,
    *,
    corpus: dict[str, Any],
    validation_share: float,
    splits: dict[str, dict[str, int]],
) -> None:
    """Writes `corpus.json` over the files that lie in the folder now."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != NAME
    }
    content = {
        "format": FORMAT,
        "corpus": corpus,
        "validation_share": validation_share,
        "splits": splits,
        "files": files,
    }
    (folder / NAME).write_text(json.dumps(content, indent=2) + "\n")


def read(folder: pathlib.Path) -> dict[str, Any]:
    """Reads `corpus.json` and checks that every file is there with its size.

    Raises:
      ValueError: the folder was not prepared, not completely, or by another version.
    """
    try:
        content = json.loads((folder / NAME).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"prepared_dir={str(folder)!r} must be a prepared folder; it has no {NAME}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / NAME} must be JSON: {error}; prepare it again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{folder / NAME} must have format {FORMAT}; prepare it again")
    for name, expected in content["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(
                f"prepared_dir={str(folder)!r} is damaged: {name} must have "
                f"{expected['bytes']} bytes and {state}; prepare it again"
            )
    return content


def verify(folder: pathlib.Path) -> dict[str, Any]:
    """Does what `read` does and compares the content of every file with its sha256.

    Raises:
      ValueError: as for `read`, or a file's content has changed.
    """
    content = read(folder)
    for name, expected in content["files"].items():
        if _sha256(folder / name) != expected["sha256"]:
            raise ValueError(
                f"prepared_dir={str(folder)!r} is damaged: the content of {name} has changed; "
                "prepare it again"
            )
    return content


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
