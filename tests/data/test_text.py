import collections
import hashlib
import itertools
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_attn.data import corpus, packing, prepare, text, tokenizer

CONTEXT = 32


@pytest.fixture
def load(prepared):
    """Opens loaders and closes them after the test, so that no reading thread stays behind."""
    opened = []

    def open_loader(**changes):
        arguments = {"split": "train", "context": CONTEXT, "batch_size": 4, "seed": 0}
        opened.append(text.loader(prepared, **(arguments | changes)))
        return opened[-1]

    yield open_loader
    for loader in opened:
        loader.close()


def rows(batch):
    """The rows of a batch as hashable things, without those that only fill it up."""
    tokens = np.concatenate([batch["inputs"], batch["targets"][:, -1:]], axis=1)
    return [tuple(r) for r in tokens.tolist() if r[0] != tokenizer.PAD]


def same(left, right):
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and np.array_equal(left[k], right[k]) for k in left
    )


def all_windows(prepared, split):
    stream = text.TokenStream(prepared, split=split)
    count = packing.num_windows(stream.num_tokens, CONTEXT)
    return [tuple(r) for r in stream.windows(np.arange(count), context=CONTEXT).tolist()]


# --- reading -----------------------------------------------------------------------------------


@hypothesis.given(st.data())
def test_any_range_of_the_stream_can_be_read(prepared, data):
    stream = text.TokenStream(prepared, split="train")
    whole = stream.read(0, stream.num_tokens)
    start = data.draw(st.integers(0, stream.num_tokens - 1))
    stop = data.draw(st.integers(start + 1, min(start + 3000, stream.num_tokens)))
    assert np.array_equal(stream.read(start, stop), whole[start:stop])


@pytest.mark.parametrize("start, stop", [(-1, 4), (4, 4), (5, 4), (0, 10**9)])
def test_ranges_outside_the_stream_are_refused(prepared, start, stop):
    with pytest.raises(ValueError, match=f"range {start}:{stop} must lie within 0:"):
        text.TokenStream(prepared, split="train").read(start, stop)


def test_batches_have_the_promised_types(load):
    batch = next(load())
    assert {name: (v.dtype.name, v.shape) for name, v in batch.items()} == {
        "inputs": ("int32", (4, CONTEXT)),
        "targets": ("int32", (4, CONTEXT)),
        "weights": ("float32", (4, CONTEXT)),
        "segment_ids": ("int32", (4, CONTEXT)),
        "positions": ("int32", (4, CONTEXT)),
    }
    assert batch["inputs"].max() < tokenizer.VOCAB_SIZE


# --- order -------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", prepare.SPLITS)
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 1000])
def test_one_epoch_has_every_window_once(load, prepared, split, shuffle, batch_size):
    batches = list(load(split=split, shuffle=shuffle, repeat=False, batch_size=batch_size))
    sizes = dict(split=split, context=CONTEXT, batch_size=batch_size)
    assert len(batches) == text.num_batches(prepared, **sizes)
    assert {b["inputs"].shape for b in batches} == {(batch_size, CONTEXT)}
    seen = [row for batch in batches for row in rows(batch)]
    expected = all_windows(prepared, split)
    assert collections.Counter(seen) == collections.Counter(expected)
    assert (seen == expected) == (not shuffle)


def test_an_epoch_scores_every_byte(load, found_bytes):
    for split in prepare.SPLITS:
        batches = list(load(split=split, shuffle=False, repeat=False))
        assert sum(float(text.num_bytes(b)) for b in batches) == found_bytes[split]


@pytest.fixture
def found_bytes(documents):
    parts = corpus.resolve(documents).split()
    return {split: sum(d.num_bytes for d in part) for split, part in parts.items()}


def test_every_epoch_has_every_window_once_in_a_new_order(load, prepared):
    expected = all_windows(prepared, "train")
    loader = load(batch_size=1)
    stream = [row for batch in itertools.islice(loader, 3 * len(expected)) for row in rows(batch)]
    epochs = [stream[i * len(expected) : (i + 1) * len(expected)] for i in range(3)]
    for epoch in epochs:
        assert collections.Counter(epoch) == collections.Counter(expected)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_seed_decides_the_order(load, prepared):
    def order(seed, count):
        return [row for b in itertools.islice(load(seed=seed), count) for row in rows(b)]

    epoch = len(all_windows(prepared, "train"))
    assert order(7, 20) == order(7, 20)
    assert order(7, 20) != order(8, 20)
    # The next seed is not the same order one epoch later.
    later = order(0, 2 * epoch // 4)[epoch : epoch + 8]
    assert later != order(1, 2)


def test_the_order_of_a_seed_is_the_same_for_ever(load):
    """Fails when Grain shuffles differently: then raise `text.ORDER`, for old states are void."""
    digest = hashlib.sha256()
    for batch in itertools.islice(load(seed=3), 10):
        digest.update(batch["inputs"].astype("<i4").tobytes())
    assert (text.ORDER, digest.hexdigest()[:16]) == (1, "b15e0e556a4fd069")


@pytest.mark.parametrize("shard_count", [1, 2, 4])
@pytest.mark.parametrize("repeat", [True, False])
def test_shards_together_are_the_global_batches(load, prepared, shard_count, repeat):
    steps = text.num_batches(prepared, split="train", context=CONTEXT, batch_size=4) + repeat * 3
    shards = [
        load(repeat=repeat, shard_index=i, shard_count=shard_count) for i in range(shard_count)
    ]
    whole = load(repeat=repeat)
    for _ in range(steps):
        parts = [next(shard) for shard in shards]
        joined = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        assert same(joined, next(whole))
    if not repeat:
        for loader in [whole, *shards]:
            assert next(loader, None) is None


def test_no_window_of_train_holds_a_document_of_validation(load, documents):
    held_out = {
        content
        for _, content in corpus.resolve(documents).read(
            corpus.resolve(documents).split()["validation"]
        )
    }
    train = b"".join(
        bytes(tokenizer.decode(np.array(row[:-1])))
        for batch in load(shuffle=False, repeat=False)
        for row in rows(batch)
    )
    long = [content for content in held_out if len(content) > 8]
    assert long
    for content in long:
        assert content not in train


# --- resume ------------------------------------------------------------------------------------


@hypothesis.given(
    before=st.integers(0, 60),
    ahead=st.integers(0, 5),
    shuffle=st.booleans(),
    shards=st.sampled_from([(1, 1), (2, 1), (1, 4), (4, 2)]),
)
@hypothesis.settings(
    max_examples=25, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_resume_is_exact(load, before, ahead, shuffle, shards):
    """Also on another number of processes, and into a loader that has moved already."""
    saved_on, resumed_on = shards
    first = load(shuffle=shuffle, shard_count=saved_on)
    for _ in range(before):
        next(first)
    taken = first.get_state()
    state = json.loads(json.dumps(taken))
    next(first)
    assert taken == state  # reading on does not change a state that was taken before

    reference = load(shuffle=shuffle, shard_index=resumed_on - 1, shard_count=resumed_on)
    expected = list(itertools.islice(reference, before + 6))[before:]

    second = load(shuffle=shuffle, shard_index=resumed_on - 1, shard_count=resumed_on)
    for _ in range(ahead):
        next(second)
    second.set_state(state)
    assert all(same(batch, next(second)) for batch in expected)
    second.set_state(state)
    assert same(expected[0], next(second))


def test_the_end_of_an_epoch_can_be_resumed(load):
    first = load(repeat=False, batch_size=1000)
    next(first)
    second = load(repeat=False, batch_size=1000)
    second.set_state(first.get_state())
    assert next(second, None) is None


@pytest.mark.parametrize(
    "field, other",
    [
        ("seed", 1),
        ("context", 16),
        ("batch_size", 8),
        ("split", "validation"),
        ("shuffle", False),
        ("repeat", False),
    ],
)
def test_a_state_of_other_settings_is_refused(load, field, other):
    loader = load()
    next(loader)
    changed = load(**{field: other})
    before = changed.get_state()
    with pytest.raises(ValueError, match=f"cannot be resumed: {field} was .* is now {other!r}"):
        changed.set_state(loader.get_state())
    assert changed.get_state() == before


def test_a_state_of_another_corpus_is_refused(load, documents, tmp_path):
    smaller = prepare.prepare(corpus.resolve(documents, max_bytes=9000), tmp_path)
    other = text.loader(smaller, split="train", context=CONTEXT, batch_size=4, seed=0)
    with pytest.raises(ValueError, match="cannot be resumed: corpus was"):
        load().set_state(other.get_state())
    other.close()


@pytest.mark.parametrize("state", [{}, {"next_index": 3}, {"fingerprint": {}}])
def test_a_state_of_something_else_is_refused(load, state):
    with pytest.raises(ValueError, match="state must come from get_state of a text loader"):
        load().set_state(state)


def test_the_fingerprint_is_json_and_what_the_state_carries(load, prepared):
    expected = text.fingerprint(prepared, split="train", context=CONTEXT, batch_size=4, seed=0)
    assert json.loads(json.dumps(expected)) == expected
    assert load().get_state()["fingerprint"] == expected
    assert load(shard_index=1, shard_count=2).get_state()["fingerprint"] == expected


# --- a caller's mistakes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"context": 0}, "context=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"batch_size": 6, "shard_count": 4}, "batch_size=6 must be a multiple of shard_count=4"),
        ({"shard_index": 2, "shard_count": 2}, r"shard_index=2 must be in 0\.\.1"),
        ({"shard_index": -1}, r"shard_index=-1 must be in 0\.\.0"),
        ({"shard_count": 0}, "shard_count=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"split": "test"}, r"split='test' must be one of \['train', 'validation'\]"),
        ({"context": 10**6}, r"context=1000000 must be less than the \d+ tokens of split 'train'"),
    ],
)
def test_mistakes_are_named(load, changes, message):
    with pytest.raises(ValueError, match=message):
        load(**changes)


def test_the_longest_context_is_the_split_itself(load, prepared):
    tokens = text.TokenStream(prepared, split="validation").num_tokens
    longest = list(load(split="validation", context=tokens - 1, batch_size=1, repeat=False))
    assert len(longest) == 1
    assert (longest[0]["segment_ids"] > 0).all()
    with pytest.raises(ValueError, match=f"context={tokens} must be less than"):
        load(split="validation", context=tokens)


def test_a_folder_that_was_not_prepared_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"must be a prepared folder; it has no corpus.json"):
        text.loader(tmp_path, split="train", context=8, batch_size=1, seed=0)
