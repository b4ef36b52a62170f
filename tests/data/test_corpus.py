import gzip
import os
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from array_record.python import array_record_module
from hypothesis import strategies as st

from sparse_attn.data import corpus, manifest, prepare, sources

from .conftest import write_documents


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# --- the order of the search -------------------------------------------------------------------


def test_first_source_that_exists_wins(machine, tmp_path, prepared):
    debian, stdlib = machine
    write(stdlib / "abc.py", b"import abc\n" * 50)
    assert corpus.resolve().source == "stdlib"
    assert corpus.resolve().name.startswith("Python 3.")

    packed = gzip.compress(b"".join(b"Word %03d \xff\n" % i for i in range(99)))
    write(debian / "usr/share/dictd/gcide.dict.dz", packed)
    found = corpus.resolve()
    assert (found.source, found.name) == ("debian", "Debian packages dict-gcide")
    assert found.num_bytes == 11 * 99

    assert corpus.resolve(prepared_dir=prepared).source == "prepared"

    text = write(tmp_path / "mine.txt", b"my own text")
    found = corpus.resolve(text, prepared_dir=prepared)
    assert (found.source, found.name, found.num_bytes) == ("path", "mine.txt", 11)


def test_every_installed_debian_package_is_taken(machine):
    debian, stdlib = machine
    write(stdlib / "abc.py", b"import abc\n")
    doc = debian / "usr/share/doc"
    write(doc / "anarchism/markdown/sectionA.md.gz", gzip.compress(b"An essay.\n" * 9))
    write(doc / "anarchism/html/sectionA.html", b"<p>An essay.</p>")
    write(doc / "linux-doc-6.1/Documentation/mm/index.rst.gz", gzip.compress(b"Memory.\n" * 9))
    write(doc / "linux-doc-6.1/Documentation/short.rst", b"Short and not packed.\n")
    write(doc / "linux-doc-6.1/html/_sources/short.rst.txt", b"Short and not packed.\n")
    write(debian / "usr/share/info/python3.11.info.gz", gzip.compress(b"Python's book.\n" * 9))
    found = corpus.resolve()
    assert found.name == "Debian packages anarchism, linux-doc, python-doc"
    texts = b"".join(text for _, text in found.read())
    assert b"essay" in texts
    assert b"Memory" in texts
    assert b"book" in texts
    assert texts.count(b"Short") == 1
    assert b"<p>" not in texts


@pytest.mark.parametrize("argument", ["path", "prepared_dir"])
def test_a_path_that_is_missing_is_an_error_not_a_fallback(argument, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{argument}='.*nowhere' must be a f.* exists"):
        corpus.resolve(**{argument: tmp_path / "nowhere"})


def test_a_path_without_text_is_an_error_not_a_fallback(tmp_path):
    with pytest.raises(ValueError, match=r"path='.*' must hold text"):
        corpus.resolve(tmp_path)
    empty = write(tmp_path / "empty.txt", b"")
    for path in (tmp_path, empty):
        with pytest.raises(ValueError, match=r"must hold text; every file in it is empty"):
            corpus.resolve(path, max_bytes=10)


def test_a_machine_without_any_text_is_an_error(machine):
    with pytest.raises(ValueError, match=r"no text in .*; path must name"):
        corpus.resolve()


def test_a_folder_that_is_not_prepared_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a prepared folder; it has no corpus.json"):
        corpus.resolve(prepared_dir=tmp_path)


@pytest.mark.parametrize("max_bytes", [0, -5])
def test_max_bytes_must_be_positive(max_bytes):
    with pytest.raises(ValueError, match=f"max_bytes={max_bytes} must be at least 1, or None"):
        corpus.resolve(max_bytes=max_bytes)


# --- the standard library ----------------------------------------------------------------------


def test_stdlib_leaves_out_tests_packages_and_this_machine(machine):
    _, stdlib = machine
    kept = {"abc.py", "pydoc_data/topics.py", "idlelib/help.txt", "latest.py", "contest/a.py"}
    dropped = {
        "test/test_abc.py",
        "unittest/test/testmock.py",
        "lib2to3/tests/data.py",
        "idlelib/idle_test/a.py",
        "site-packages/jax/__init__.py",
        "dist-packages/a.py",
        "__pycache__/abc.py",
        "config-3.13-x86_64-linux-gnu/python-config.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        ".hidden.py",
        "lib-dynload/a.so",
    }
    for name in kept | dropped:
        write(stdlib / name, f"the text of {name}".encode())
    assert {d.name for d in corpus.resolve().documents} == kept


def test_the_real_stdlib_is_large_and_always_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "DEBIAN_ROOT", tmp_path)
    first, second = corpus.resolve(), corpus.resolve()
    assert first.num_bytes > 5e6
    assert first.sha256 == second.sha256
    assert first.documents == second.documents
    assert "{}.{}.{}".format(*sys.version_info[:3]) in first.describe()
    held = sum(d.num_bytes for d in first.split()["validation"]) / first.num_bytes
    assert 0.05 <= held < 0.08


# --- content -----------------------------------------------------------------------------------


def test_sha256_follows_content_borders_and_order_not_the_place(tmp_path):
    def sha(name, **files):
        for file, content in files.items():
            write(tmp_path / name / file, content)
        return corpus.resolve(tmp_path / name).sha256

    base = sha("base", a=b"one", b=b"two")
    assert sha("moved", a=b"one", b=b"two") == base
    assert sha("renamed", c=b"one", d=b"two") == base
    assert sha("with_empty", a=b"one", aa=b"", b=b"two") == base
    assert sha("swapped", a=b"two", b=b"one") != base
    assert sha("border", a=b"on", b=b"etwo") != base
    assert sha("changed", a=b"one", b=b"twO") != base


def test_duplicates_empty_and_binary_files_go_out_and_are_counted(tmp_path):
    write(tmp_path / "a.txt", b"the same text")
    write(tmp_path / "sub/b.txt", b"the same text")
    write(tmp_path / "c.txt", b"another text")
    write(tmp_path / "empty.txt", b"")
    write(tmp_path / "picture.png", b"\x89PNG\0\0\0")
    write(tmp_path / ".git/config", b"hidden")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    found = corpus.resolve(tmp_path)
    assert [d.name for d in found.documents] == ["a.txt", "c.txt"]
    line = "(left out: 1 empty, 1 binary, 1 duplicates)"
    assert found.describe().endswith(line)
    assert found.describe().startswith(f"data: {tmp_path.name}, 25 bytes, 2 documents, sha256 ")
    assert found.to_json()["left_out"]["binary"] == 1


def test_one_file_is_taken_as_it_is_and_cut_at_paragraphs(tmp_path):
    paragraphs = [b"%d " % i * 40 + b"\nsecond line\n\n" for i in range(200)]
    path = write(tmp_path / "book.txt", b"\0" + b"".join(paragraphs))
    found = corpus.resolve(path)
    assert b"".join(text for _, text in found.read()) == path.read_bytes()
    assert found.num_documents > 40
    assert all(text.endswith(b"\n\n") for _, text in found.read())
    parts = found.split()
    assert len(parts["validation"]) < len(parts["train"]) / 5


def test_text_without_line_ends_is_cut_all_the_same(tmp_path):
    path = write(tmp_path / "line.txt", np.random.default_rng(0).bytes(300_000))
    found = corpus.resolve(path)
    assert b"".join(text for _, text in found.read()) == path.read_bytes()
    assert max(d.num_bytes for d in found.documents) <= 64 * 1024
    assert all(found.split().values())


@hypothesis.given(st.lists(st.binary(max_size=700), min_size=1, max_size=12), st.integers(1, 4000))
@hypothesis.settings(max_examples=40)
def test_documents_of_any_size_are_kept_whole(tmp_path_factory, texts, repeats):
    folder = tmp_path_factory.mktemp("any")
    for number, text in enumerate(texts):
        write(
            folder / f"{number:02d}", b"%d" % number + (text * repeats)[:20_000].replace(b"\0", b"")
        )
    found = corpus.resolve(folder)
    read = {}
    for document, text in found.read():
        name = document.name.split("#")[0]
        assert len(text) == document.num_bytes > 0
        read[name] = read.get(name, 0) + len(text)
    assert sum(read.values()) == found.num_bytes
    assert len({d.digest for d in found.documents}) == found.num_documents
    if found.left_out["duplicates"] == 0:
        assert read == {p.name: p.stat().st_size for p in folder.iterdir()}


def test_max_bytes_keeps_whole_documents(documents):
    every = corpus.resolve(documents)
    some = corpus.resolve(documents, max_bytes=5000)
    assert 3000 < some.num_bytes <= 5000
    assert set(some.documents) < set(every.documents)
    assert some.left_out["beyond max_bytes"] == every.num_documents - some.num_documents
    assert corpus.resolve(documents, max_bytes=every.num_bytes).sha256 == every.sha256


def test_max_bytes_below_the_shortest_document_is_refused(tmp_path):
    write(tmp_path / "a.txt", b"123456789")
    with pytest.raises(ValueError, match="max_bytes=8 must be at least 9"):
        corpus.resolve(tmp_path, max_bytes=8)


def test_a_damaged_gzip_file_is_named(tmp_path):
    whole = gzip.compress(b"text " * 1000)
    for content in (whole[:-20], b"not gzip", whole[:15] + b"\xff\xff" + whole[17:]):
        path = write(tmp_path / "a.txt.gz", content)
        with pytest.raises(ValueError, match=r"a\.txt\.gz must be a complete gzip file"):
            corpus.resolve(path)


def test_a_file_that_changes_after_it_was_hashed_is_noticed(tmp_path):
    path = write(tmp_path / "a.txt", b"first")
    found = corpus.resolve(tmp_path)
    path.write_bytes(b"later")
    with pytest.raises(ValueError, match=r"a\.txt changed while it was being read"):
        list(found.read())


# --- record files and TFDS folders --------------------------------------------------------------


def write_records(path, records):
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def test_array_record_files_hold_one_document_a_record(tmp_path):
    write_records(tmp_path / "t.array_record-00000-of-00002", [b"one \xff\0", b"two"])
    write_records(tmp_path / "t.array_record-00001-of-00002", [b"three", b"two", b""])
    found = corpus.resolve(tmp_path)
    assert [text for _, text in found.read()] == [b"one \xff\0", b"two", b"three"]
    assert (found.left_out["duplicates"], found.left_out["empty"]) == (1, 1)
    single = corpus.resolve(tmp_path / "t.array_record-00001-of-00002")
    assert [text for _, text in single.read()] == [b"three", b"two"]


def test_a_prepared_folder_is_recognised_as_path_too(prepared, documents):
    expected = corpus.resolve(documents)
    for found in (corpus.resolve(prepared), corpus.resolve(prepared_dir=prepared)):
        assert (found.source, found.prepared_dir) == ("prepared", prepared)
        assert (found.sha256, found.num_bytes) == (expected.sha256, expected.num_bytes)
        assert prepare.prepare(found, "unused") == prepared
        with pytest.raises(ValueError, match="prepared and split already"):
            list(found.read())
        with pytest.raises(ValueError, match="prepared and split already"):
            found.split()
    with pytest.raises(ValueError, match="max_bytes=10 must be None for a prepared folder"):
        corpus.resolve(prepared, max_bytes=10)


def test_another_tfds_folder_gives_its_train_split(tmp_path):
    import tensorflow_datasets as tfds

    class Reviews(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"review": tfds.features.Text(), "n": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(20), "test": self._generate_examples(3)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"review": f"{count}: review number {i}", "n": i}

    builder = Reviews(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    found = corpus.resolve(builder.data_dir)
    assert found.num_documents == 20
    assert next(found.read())[1] == b"20: review number 0"
    shard = next(p for p in os.listdir(builder.data_dir) if "test.array_record" in p)
    with pytest.raises(ValueError, match="must not be one shard of a TFDS data set"):
        corpus.resolve(os.path.join(builder.data_dir, shard))
    with pytest.raises(ValueError, match="must not hold prepared data sets among its files"):
        corpus.resolve(tmp_path)


def test_a_prepared_folder_without_its_manifest_is_not_read_as_documents(documents, tmp_path):
    folder = prepare.prepare(corpus.resolve(documents), tmp_path)
    (folder / manifest.NAME).unlink()
    with pytest.raises(ValueError, match=r"must have a corpus.json; prepare it again"):
        corpus.resolve(folder)


# --- the split ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3])
def test_the_split_holds_its_share_and_every_document_once(documents, share):
    found = corpus.resolve(documents)
    parts = found.split(share)
    names = [d.name for part in parts.values() for d in part]
    assert sorted(names) == sorted(d.name for d in found.documents)
    held = sum(d.num_bytes for d in parts["validation"])
    longest = max(d.num_bytes for d in found.documents)
    assert share * found.num_bytes <= held < share * found.num_bytes + longest


def test_the_split_does_not_depend_on_names_or_order(tmp_path):
    written = write_documents(tmp_path / "a")
    for number, text in enumerate(reversed(list(written.values()))):
        write(tmp_path / "b" / f"{number:03d}", text)

    def held_out(folder):
        found = corpus.resolve(tmp_path / folder)
        return {d.digest for d in found.split()["validation"]}

    assert held_out("a") == held_out("b")


def test_a_larger_corpus_keeps_most_of_its_validation_documents(tmp_path):
    write_documents(tmp_path / "all" / "x", count=200, seed=1)
    before = {d.digest for d in corpus.resolve(tmp_path / "all").split()["validation"]}
    write_documents(tmp_path / "all" / "y", count=10, seed=2)
    after = {d.digest for d in corpus.resolve(tmp_path / "all").split()["validation"]}
    assert len(before & after) >= 0.7 * len(before)


def test_too_little_text_for_two_splits_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="must be enough for train and validation"):
        corpus.resolve(write(tmp_path / "a.txt", b"tiny")).split()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2.0])
def test_the_share_must_be_a_share(documents, share):
    with pytest.raises(ValueError, match=f"validation_share={share} must be between 0 and 1"):
        corpus.resolve(documents).split(share)


# --- imports -----------------------------------------------------------------------------------


def test_nothing_here_imports_tensorflow(documents, tmp_path):
    """In a fresh process, since another test may import it."""
    code = f"""
import sys
from sparse_attn.data import corpus, packing, prepare, text, tokenizer
folder = prepare.prepare(corpus.resolve({str(documents)!r}), {str(tmp_path)!r})
batches = text.loader(folder, split="train", context=16, batch_size=2, seed=0)
print(next(batches)["inputs"].shape, "tensorflow" in sys.modules)
"""
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert result.stdout == "(2, 16) False\n", result.stderr
