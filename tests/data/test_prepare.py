import json
import logging
import os
import shutil
import subprocess
import sys

import pytest

from sparse_attn.data import corpus, manifest, prepare, text, tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))


@pytest.fixture
def found(documents):
    return corpus.resolve(documents)


def stream_of(folder, split):
    stream = text.TokenStream(folder, split=split)
    return stream.read(0, stream.num_tokens)


def expected_stream(found, split):
    parts = []
    for _, content in found.read(found.split()[split]):
        parts += [tokenizer.BOS, *content, tokenizer.EOS]
    return parts


@pytest.mark.parametrize("split", prepare.SPLITS)
def test_what_is_read_is_what_was_found(found, prepared, split):
    assert stream_of(prepared, split).tolist() == expected_stream(found, split)


def test_train_and_validation_share_no_document(found, prepared):
    def texts(split):
        held = b"".join(bytes([t]) if t < 256 else b"\0" for t in stream_of(prepared, split))
        return {document for document in held.split(b"\0") if document}

    assert not texts("train") & texts("validation")
    assert texts("train") | texts("validation") == {content for _, content in found.read()}


def test_long_documents_are_stored_in_pieces(tmp_path):
    for number in range(50):
        (tmp_path / f"{number}.txt").write_bytes(os.urandom(40_000).replace(b"\0", b"x"))
    found = corpus.resolve(tmp_path)
    assert found.num_documents == 50
    folder = prepare.prepare(found, tmp_path / "out")
    held = manifest.read(folder)["splits"]["train"]
    assert held["pieces"] == 3 * held["documents"]
    assert stream_of(folder, "train").tolist() == expected_stream(found, "train")


def test_the_manifest_counts(found, prepared):
    content = manifest.verify(prepared)
    assert content["corpus"] == json.loads(json.dumps(found.to_json()))
    for split, documents in found.split().items():
        held = content["splits"][split]
        assert held["documents"] == len(documents)
        assert held["bytes"] == sum(d.num_bytes for d in documents)
        assert held["tokens"] == held["bytes"] + 2 * held["documents"]


def test_preparing_again_changes_nothing(found, tmp_path, monkeypatch):
    folder = prepare.prepare(found, tmp_path)
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    monkeypatch.setattr(prepare, "_write", lambda *_: pytest.fail("wrote again"))
    assert prepare.prepare(found, tmp_path) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == stamps


def test_other_content_and_other_shares_get_other_folders(found, documents, tmp_path):
    folders = {
        prepare.prepare(found, tmp_path),
        prepare.prepare(found, tmp_path, validation_share=0.2),
        prepare.prepare(corpus.resolve(documents, max_bytes=9000), tmp_path),
    }
    assert len(folders) == 3
    shares = sorted(manifest.read(folder)["validation_share"] for folder in folders)
    assert shares == [0.05, 0.05, 0.2]
    wide = next(f for f in folders if manifest.read(f)["validation_share"] == 0.2)
    again = corpus.resolve(prepared_dir=wide)
    assert prepare.prepare(again, tmp_path) == wide
    with pytest.raises(ValueError, match=r"validation_share=0.05 must be 0.2 or None"):
        prepare.prepare(again, tmp_path, validation_share=0.05)


def test_a_prepared_folder_can_be_moved(found, tmp_path):
    folder = prepare.prepare(found, tmp_path / "here")
    before = stream_of(folder, "train").tolist()
    moved = tmp_path / "elsewhere"
    shutil.move(folder, moved)
    assert stream_of(moved, "train").tolist() == before


DAMAGES = {
    "truncated": lambda p: os.truncate(p, p.stat().st_size // 2),
    "deleted": lambda p: p.unlink(),
    "one bit": lambda p: p.write_bytes(flip(p.read_bytes())),
    "emptied": lambda p: p.write_bytes(b""),
}


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


FILES = ["*train.array_record*", "train-offsets.npy", "validation-opens.npy", "features.json"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", [*FILES, manifest.NAME])
def test_a_damaged_folder_is_made_anew(prepared, found, tmp_path, caplog, damage, pattern):
    folder = prepare.prepare(found, tmp_path)
    expected = stream_of(prepared, "train").tolist()
    [path] = folder.glob(pattern)
    if damage == "one bit" and pattern == manifest.NAME:
        path.write_text(path.read_text().replace(found.sha256, found.sha256[::-1]))
    else:
        DAMAGES[damage](path)
    if damage != "one bit":
        with pytest.raises(ValueError, match=r"prepare it again|must be a prepared folder"):
            text.TokenStream(folder, split="train")
    if pattern != manifest.NAME:
        with pytest.raises(ValueError, match=r"is damaged: .* prepare it again"):
            manifest.verify(folder)
    with caplog.at_level(logging.WARNING):
        assert prepare.prepare(found, tmp_path) == folder
    assert "damaged or half written; preparing it again" in caplog.text
    assert stream_of(folder, "train").tolist() == expected
    manifest.verify(folder)


def test_a_manifest_of_another_format_is_refused(found, tmp_path):
    folder = prepare.prepare(found, tmp_path)
    path = folder / manifest.NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))
    with pytest.raises(ValueError, match=r"must have format 1; prepare it again"):
        manifest.read(folder)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"must have format 1; prepare it again"):
        manifest.read(folder)


def test_a_half_written_folder_is_never_used(found, tmp_path, monkeypatch):
    def dies(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(found, tmp_path)
    [parent] = tmp_path.iterdir()
    assert [p.name for p in parent.iterdir()] == [".lock"]
    # What a process killed outright would leave.
    left = parent / ".incomplete-123"
    (left / manifest.DATASET / "1.0.0").mkdir(parents=True)
    (parent / manifest.DATASET / "1.0.0").mkdir(parents=True)
    folder = prepare.prepare(found, tmp_path)
    manifest.verify(folder)
    assert not left.exists()


def test_too_little_text_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"tiny")
    with pytest.raises(ValueError, match="must be enough for train and validation"):
        prepare.prepare(corpus.resolve(tmp_path / "a.txt"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_processes_may_prepare_at_the_same_time(documents, prepared, tmp_path):
    """Three processes start together; one of them meets a folder that is damaged from the start."""
    found = corpus.resolve(documents)
    folder = prepare.prepare(found, tmp_path)
    next(folder.glob("*train.array_record*")).write_bytes(b"damaged")
    code = f"""
import hashlib, sys
from sparse_attn.data import corpus, prepare, text
found = corpus.resolve({str(documents)!r})
print("ready", flush=True)
sys.stdin.readline()
folder = prepare.prepare(found, {str(tmp_path)!r})
stream = text.TokenStream(folder, split="train")
print(hashlib.sha256(stream.read(0, stream.num_tokens).tobytes()).hexdigest())
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0, 0], answers
    assert len({out for out, _ in answers}) == 1
    assert manifest.verify(folder)["files"].keys() == manifest.verify(prepared)["files"].keys()
    assert stream_of(folder, "train").tolist() == stream_of(prepared, "train").tolist()
    assert not list(folder.parent.parent.glob(".incomplete-*"))
