"""The tasks of MAD [arXiv:2403.17844]: each against its own definition."""

import numpy as np
import pytest

from sparse_attn.data.synthetic import base, mad
from tests.data.test_synthetic import draw


def test_mad_recall_marks_repeated_keys_only():
    task = mad.InContextRecall(vocab_size=12, length=31, noise_vocab=4, noise=0.3)
    noisy = 0
    for seed in range(30):
        x = draw(task, seed, split="test")
        table = {}
        pairs = x["inputs"][:-1].reshape(-1, 2).tolist() + [[x["inputs"][-1], None]]
        for i, (key, value) in enumerate(pairs):
            if key >= 8:
                noisy += 1
                assert value >= 8
                assert x["weights"][2 * i] == 0
                continue
            assert key < 4
            assert x["weights"][2 * i] == (key in table)
            if key in table:
                assert x["targets"][2 * i] == table[key]
                assert value in (None, table[key])
            table.setdefault(key, value)
    assert 0.2 < noisy / (30 * 15) < 0.4
    trained = draw(task, 0, split="train")
    np.testing.assert_array_equal(trained["targets"][:-1], trained["inputs"][1:])
    assert trained["weights"].all()


def test_mad_noise_is_a_fifth_of_the_pairs_and_of_its_own_tokens():
    task = mad.NoisyInContextRecall()
    assert task.chance == 1 / 8
    pairs = np.stack([draw(task, seed)["inputs"][:-1] for seed in range(50)]).reshape(-1, 2)
    noise = (pairs >= 16).all(1)
    assert 0.18 < noise.mean() < 0.22
    assert pairs[~noise, 0].max() == 7
    assert set(pairs[~noise, 1]) == set(range(8, 16))
    assert set(pairs[noise].ravel()) == set(range(16, 32))


def test_mad_fuzzy_recall_ends_with_a_pair_seen_before():
    task = mad.FuzzyRecall()
    for seed in range(20):
        x = draw(task, seed, split="test")
        tokens = [*x["inputs"].tolist(), int(x["targets"][-1])]
        answer_size = next(n for n in range(1, 4) if tokens[-n - 1] < 7)
        pair = tokens[-3 - answer_size :]
        assert all(t < 7 for t in pair[:3])
        assert all(7 <= t < 15 for t in pair[3:])
        assert len(set(pair)) == len(pair)
        assert any(tokens[i : i + len(pair)] == pair for i in range(len(tokens) - len(pair)))
        np.testing.assert_array_equal(x["targets"][-answer_size:], pair[3:])
        assert x["weights"][-answer_size:].all()


@pytest.mark.parametrize("split", base.SPLITS)
@pytest.mark.parametrize("length", [22, 48])
def test_mad_fuzzy_recall_has_the_probe_anywhere_but_always(length, split):
    task = mad.FuzzyRecall(vocab_size=41, length=length)
    begins, ends = [], []
    for seed in range(400):
        x = draw(task, seed, split=split)
        tokens = [*x["inputs"].tolist(), int(x["targets"][-1])]
        answer = next(n for n in range(1, 4) if tokens[-n - 1] < 20)
        key = next(n for n in range(1, 4) if not tokens[-answer - n - 1] < 20)
        pair, begin = tokens[-key - answer :], tokens.count(40)
        # The whole motif: what is before and behind it belongs to other pairs.
        found = [
            i
            for i in range(begin, length + 1 - len(pair))
            if tokens[i : i + len(pair)] == pair
            and (i == begin or tokens[i - 1] >= 20)
            and tokens[i + len(pair)] < 20
        ]
        assert found, tokens
        begins.append(found[0] - begin)
        ends.append(begins[-1] + len(pair))
    assert min(begins) == 0
    # Behind the latest there is room for one more pair, and for itself again.
    assert max(ends) >= length - 8


def test_mad_memorization_is_one_dictionary():
    task = mad.Memorization(vocab_size=21, length=64)
    pairs = set()
    for seed in range(10):
        x = draw(task, seed)
        assert (x["inputs"][1::2] == 20).all()
        pairs |= set(zip(x["inputs"][::2].tolist(), x["targets"][1::2].tolist(), strict=True))
    assert len(pairs) == len({k for k, _ in pairs}) == len({v for _, v in pairs}) == 10
    other = mad.Memorization(vocab_size=21, length=64, dictionary_seed=1)
    assert (other.dictionary() != task.dictionary()).any()


def test_selective_copy_repeats_in_order():
    x = draw(mad.SelectiveCopy())
    body, rest = x["inputs"][:-17], x["inputs"][-17:]
    np.testing.assert_array_equal(body[body != 14], x["targets"][-16:])
    assert rest.tolist() == [15] + [14] * 16
    assert x["weights"].sum() == 16


def test_compression_scores_every_token():
    x = draw(mad.Compression())
    np.testing.assert_array_equal(x["inputs"], x["targets"])
    assert x["inputs"][-1] == 15
    assert x["weights"].all()
