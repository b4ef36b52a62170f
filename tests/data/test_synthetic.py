"""Synthetic tasks: every one is found by itself; each is checked against its own definition."""

import dataclasses
import importlib
import inspect
import itertools
import pkgutil

import numpy as np
import pytest

from sparse_attn.data import synthetic
from sparse_attn.data.synthetic import (
    base,
    group_words,
    induction,
    joint_recall,
    listops,
    mad,
    mqar,
    needle,
    regression,
    ruler,
)

MODULES = [
    importlib.import_module(f"{synthetic.__name__}.{m.name}")
    for m in pkgutil.iter_modules(synthetic.__path__)
]
TASKS = [
    cls
    for module in MODULES
    for _, cls in inspect.getmembers(module, inspect.isclass)
    if issubclass(cls, base.Task) and cls is not base.Task and cls.__module__ == module.__name__
]
SMALL = {listops.ListOps: dict(length=60, min_size=10)}


def draw(task, seed=0, **kwargs):
    return task.example(np.random.default_rng(seed), **kwargs)


def scored(example):
    return np.flatnonzero(example["weights"])


@pytest.mark.parametrize("cls", TASKS, ids=lambda c: c.__name__)
def test_example_has_the_common_form(cls):
    task = cls(**SMALL.get(cls, {}))
    assert dataclasses.is_dataclass(task)
    assert hash(task) == hash(cls(**SMALL.get(cls, {})))
    for split in base.SPLITS:
        example = draw(task, split=split)
        assert {name: len(x) for name, x in example.items()} == dict.fromkeys(
            ("inputs", "targets", "weights"), task.length
        )
        assert 0 < example["weights"].sum() <= task.length
        if example["inputs"].dtype != np.float32:
            assert example["inputs"].dtype == example["targets"].dtype == np.int32
            for x in (example["inputs"], example["targets"]):
                assert x.min() >= 0
                assert x.max() < task.vocab_size
        assert task.chance > 0


@pytest.mark.parametrize("cls", TASKS, ids=lambda c: c.__name__)
def test_an_example_is_a_function_of_seed_split_and_index(cls):
    task = cls(**SMALL.get(cls, {}))

    def first(index, **kwargs):
        kwargs = dict(split="train", seed=0, size=10) | kwargs
        return base.Source(task, **kwargs)[index]["inputs"].tobytes()

    assert first(3) == first(3) == first(3, size=99)
    assert len({first(3), first(4), first(3, seed=1), first(3, split="test")}) == 4


def test_dataset_batches_shuffles_and_refuses():
    task = induction.Induction(length=8)
    data = base.dataset(task, split="train", seed=0, size=6)
    batch = next(iter(data.batch(3)))
    np.testing.assert_array_equal(batch["inputs"][2], data[2]["inputs"])
    shuffled = data.shuffle(seed=1)
    assert sorted(x["inputs"].tobytes() for x in shuffled) == sorted(
        x["inputs"].tobytes() for x in data
    )
    for bad in (dict(split="eval"), dict(seed=-1), dict(size=0)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            base.dataset(task, **(dict(split="train", seed=0, size=6) | bad))


def test_mqar_asks_each_key_once_for_its_value():
    task = mqar.Mqar(vocab_size=128, length=32, num_pairs=8, filler="zero")
    for seed in range(20):
        x = draw(task, seed)
        keys, values = x["inputs"][0:16:2], x["inputs"][1:16:2]
        assert len(set(keys)) == len(set(values)) == 8
        assert keys.min() >= 1
        assert keys.max() < 64 <= values.min()
        at = scored(x)
        assert len(at) == 8
        assert (at >= 16).all()
        assert (at % 2 == 0).all()
        table = dict(zip(keys, values, strict=True))
        assert [table[k] for k in x["inputs"][at]] == x["targets"][at].tolist()
        assert set(np.flatnonzero(x["inputs"][16:]) + 16) == set(at)


def gaps_of_pairs(task, way, count):
    """The gap of each pair `[count, num_pairs]`, in the order of the pairs."""
    begin = 2 * task.num_pairs
    if way == "batch":
        return (task.batch(np.random.default_rng(0), count)["places"] - begin) // 2
    tokens = np.stack([draw(task, seed)["inputs"] for seed in range(count)])
    keys, rest = tokens[:, 0:begin:2], tokens[:, begin::2]
    return (rest[:, None] == keys[..., None]).argmax(2)


@pytest.mark.parametrize("way", ["example", "batch"])
@pytest.mark.parametrize("power_a", [0.01, 0.5])
def test_mqar_gaps_follow_the_power_law(power_a, way):
    task = mqar.Mqar(vocab_size=64, length=26, num_pairs=3, power_a=power_a, filler="zero")
    law = np.arange(1.0, 11.0) ** (power_a - 1)
    law /= law.sum()
    expected = np.zeros((3, 10))
    for gaps in itertools.permutations(range(10), 3):  # One after the other, without replacement.
        chance, left = 1.0, 1.0
        for gap in gaps:
            chance, left = chance * law[gap] / left, left - law[gap]
        expected[range(3), gaps] += chance
    drawn = gaps_of_pairs(task, way, 5000)
    seen = [np.bincount(gaps, minlength=10) / len(gaps) for gaps in drawn.T]
    np.testing.assert_allclose(seen, expected, atol=0.02)
    # The law of the first pair is not that of the last, which finds the near places taken.
    assert expected[0, 0] > expected[2, 0] + 0.04


@pytest.mark.parametrize("vocab_size", [64, 128])  # Distinct numbers by sorting, by new draws.
def test_mqar_batches_are_examples(vocab_size):
    task = mqar.Mqar(vocab_size=vocab_size, length=40, num_pairs=6, filler="zero")
    x = task.batch(np.random.default_rng(0), 50)
    keys, values, half = x["inputs"][:, 0:12:2], x["inputs"][:, 1:12:2], vocab_size // 2
    for drawn, low, high in ((keys, 1, half), (values, half, vocab_size)):
        assert (np.diff(np.sort(drawn), axis=1) > 0).all()
        assert low <= drawn.min()
        assert drawn.max() < high
    np.testing.assert_array_equal(np.take_along_axis(x["inputs"], x["places"], 1), keys)
    np.testing.assert_array_equal(x["answers"], values)
    assert (x["places"] % 2 == 0).all()
    assert x["places"].min() >= 12
    assert ((x["inputs"][:, 12:] > 0).sum(1) == 6).all()
    noisy = dataclasses.replace(task, filler="random").batch(np.random.default_rng(0), 50)
    kept = x["inputs"] > 0
    np.testing.assert_array_equal(noisy["inputs"][kept], x["inputs"][kept])
    assert len(set(noisy["inputs"][~kept])) > 20


def test_mqar_random_filler_leaves_pairs_and_questions():
    x, z = (draw(mqar.Mqar(filler=f), 5) for f in mqar.FILLERS)
    kept = z["inputs"] > 0
    np.testing.assert_array_equal(x["inputs"][kept], z["inputs"][kept])
    np.testing.assert_array_equal(x["targets"], z["targets"])
    assert len(set(x["inputs"][~kept])) > 20


def test_joint_recall_needs_the_context():
    task = joint_recall.JointRecall(contexts=(3, 4), keys=(2, 5), num_values=6)
    for seed in range(20):
        x = draw(task, seed)
        tokens = x["inputs"].tolist()
        assert tokens[0] == joint_recall.BOS
        assert tokens.count(joint_recall.SEPARATOR) == 1
        cut = tokens.index(joint_recall.SEPARATOR)
        table, context = {}, None
        for i, token in enumerate(tokens):
            if 3 <= token < 7:
                context = token
            elif 7 <= token < 12:
                pair = (context, token)
                if i < cut:
                    assert pair not in table
                    assert x["weights"][i] == 0
                    table[pair] = tokens[i + 1]
                else:
                    assert x["weights"][i] == 1
                    assert x["targets"][i] == table[pair] == tokens[i + 1]
        assert len(table) == x["weights"].sum()
        assert 3 <= len({c for c, _ in table}) <= 4
        assert 2 <= len({k for _, k in table}) <= 5
    assert joint_recall.JointRecall().length == 2 * 16 * 33 + 2


def copied(task):
    """The share of answers that stand at their own places."""
    drawn = [draw(task, seed) for seed in range(20)]
    return np.concatenate([(x["inputs"] == x["targets"])[scored(x)] for x in drawn]).mean()


@pytest.mark.parametrize("cls", TASKS, ids=lambda c: c.__name__)
def test_what_a_decoder_could_copy_or_not_read_is_not_for_it(cls):
    task = cls(**SMALL.get(cls, {}))
    readable = hasattr(task, "vocab_size")
    assert (task.not_for_decoder is None) == (readable and copied(task) < 0.5), cls


@pytest.mark.parametrize("depth, place", [(0.0, 0), (0.5, 10), (1.0, 20), (None, None)])
def test_needle_is_where_it_should_be(depth, place):
    task = needle.Needle(vocab_size=60, length=23, depth=depth, distractors=3)
    places = set()
    for seed in range(40):
        x = draw(task, seed)
        key, value = x["inputs"][-1], x["targets"][-1]
        (at,) = np.flatnonzero(x["inputs"][:-1] == key)
        assert x["inputs"][at + 1] == value
        assert 20 <= value < 40
        assert (x["inputs"][:-1] < 20).sum() == 4
        places.add(int(at))
    assert places == {place} if place is not None else len(places) > 5


def test_variable_tracking_follows_the_chain():
    task = ruler.VariableTracking(vocab_size=64, length=60, chains=3, hops=3)
    for seed in range(20):
        x = draw(task, seed)
        source, i = {}, 0
        while i < 59:
            if 16 <= x["inputs"][i] < 48:
                source[x["inputs"][i]] = x["inputs"][i + 1]
                assert x["inputs"][i + 1] < 16 or x["inputs"][i + 1] in source
                i += 1
            i += 1
        assert len(source) == 12
        at, hops = x["inputs"][-1], 0
        while at >= 16:
            at, hops = source[at], hops + 1
        assert at == x["targets"][-1]
        assert hops == 4


def test_common_words_are_the_frequent_ones():
    task = ruler.CommonWords()
    x = draw(task)
    mark = x["inputs"].tolist().index(127)
    counts = np.bincount(x["inputs"][:mark])
    assert sorted(counts[counts > 0]) == [3] * 50 + [30] * 10
    np.testing.assert_array_equal(x["targets"][mark:], np.flatnonzero(counts == 30))
    np.testing.assert_array_equal(x["inputs"][mark + 1 :], x["targets"][mark:-1])


def test_induction_answers_what_followed():
    for seed in range(50):
        x = draw(induction.Induction(vocab_size=5, length=9), seed)
        first = x["inputs"].tolist().index(4)
        assert (x["inputs"] == 4).sum() == 2
        assert x["inputs"][-1] == 4
        assert x["targets"][-1] == x["inputs"][first + 1]


def test_listops_by_hand_and_against_another_evaluator():
    words = "[MAX 2 9 [MIN 4 7 ] [MED 1 2 6 9 ] [SM 5 5 3 ] ]"
    names = [*map(str, range(10)), *(f"[{o}" for o in listops.OPERATORS), "]"]
    assert listops.value([names.index(w) for w in words.split()]) == 9
    assert listops.value([names.index(w) for w in ["[MED", "1", "2", "6", "9", "]"]]) == 4
    python = {
        "[MIN": "min([",
        "[MAX": "max([",
        "[MED": "int(np.median([",
        "[SM": "(lambda x: sum(x) % 10)([",
    }
    for seed in range(20):
        x = draw(listops.ListOps(length=120, min_size=20, max_depth=5), seed)
        code, closing = "", []
        for word in listops.text(x["inputs"]).split():
            if word in python:
                code += python[word]
                closing.append("]))" if word == "[MED" else "])")
            code += closing.pop() + "," if word == "]" else "" if word in python else f"{word},"
        assert eval(code, {"np": np})[0] == x["targets"][-1]
        assert 20 < (x["inputs"] != listops.PAD).sum() < 120


def trees(tokens, depth=1):
    """(operator, number of arguments, depth) of every operator of an expression."""
    found, stack = [], []
    for token in tokens:
        if token < 10:
            stack[-1][1] += 1
        elif token < listops.CLOSE:
            if stack:
                stack[-1][1] += 1
            stack.append([token - 10, 0, len(stack) + 1])
        elif token == listops.CLOSE:
            found.append(tuple(stack.pop()))
    return found


def test_listops_trees_are_drawn_as_in_the_original():
    # No tree is too long, and only a digit alone too short: numbers are those of the recipe.
    task = listops.ListOps(length=124, min_size=3, max_depth=3)
    drawn = [draw(task, seed)["inputs"] for seed in range(2000)]
    operators, counts, depths = np.array([t for x in drawn for t in trees(x)]).T
    assert set(depths) == {1, 2}
    np.testing.assert_allclose(np.bincount(operators) / len(operators), 1 / 4, atol=0.02)
    for depth in (1, 2):
        shares = np.bincount(counts[depths == depth], minlength=11) / (depths == depth).sum()
        np.testing.assert_allclose(shares, [0, 0, *[1 / 9] * 9], atol=0.02)
    arguments = counts[depths == 1].sum()
    assert abs((depths == 2).sum() / arguments - 1 / 4) < 0.02  # The other three are digits.
    tokens = np.concatenate(drawn)
    digits = np.bincount(tokens[tokens < 10], minlength=10)
    np.testing.assert_allclose(digits / digits.sum(), 1 / 10, atol=0.01)


def test_listops_of_full_size_are_deep_and_all_different():
    sources = [base.Source(listops.ListOps(), split=s, seed=0, size=20) for s in base.SPLITS]
    drawn = [source[i]["inputs"] for source in sources for i in range(20)]
    sizes = [(x != listops.PAD).sum() for x in drawn]
    assert 500 < min(sizes) < 800
    assert 1500 < max(sizes) < 2000
    found = [np.array(trees(x)) for x in drawn]
    assert {t[:, 2].max() for t in found} == {9}  # Below the ninth there are digits only.
    assert all(t[:, 1].min() == 2 for t in found)
    assert max(t[:, 1].max() for t in found) == 10
    shares = np.bincount(np.concatenate(found)[:, 0]) / sum(map(len, found))
    np.testing.assert_allclose(shares, 1 / 4, atol=0.02)
    assert len({listops.text(x) for x in drawn}) == 40


def test_regression_targets_are_linear_in_the_inputs():
    task = regression.LinearRegression(dim=3, num_points=8)
    x = draw(task)
    points, values = x["inputs"][::2], x["targets"][::2]
    np.testing.assert_array_equal(x["inputs"][1::2, 0], values)
    assert not x["inputs"][1::2, 1:].any()
    _weights, residual, *_ = np.linalg.lstsq(points, values, rcond=None)
    assert residual < 1e-9
    errors = np.mean([draw(task, s)["targets"][::2] ** 2 for s in range(2000)])
    assert abs(errors - task.chance) < 0.2


@pytest.mark.parametrize("group, order", [("S3", 6), ("A5", 60), ("S5", 120), ("A4xZ5", 60)])
def test_groups_are_groups(group, order):
    table = group_words.table(group)
    assert table.shape == (order, order)
    np.testing.assert_array_equal(np.sort(table, 0), np.indices(table.shape)[0])
    np.testing.assert_array_equal(np.sort(table, 1), np.indices(table.shape)[1])
    np.testing.assert_array_equal(table[0], np.arange(order))
    a, b, c = np.random.default_rng(0).integers(order, size=(3, 200))
    np.testing.assert_array_equal(table[table[a, b], c], table[a, table[b, c]])


def test_only_a5_and_s5_are_not_solvable():
    def derived(table, members):
        inverse = np.argmin(table, 1)  # Where the product is the identity, element 0.
        commutators = {
            int(table[table[inverse[a], inverse[b]], table[a, b]])
            for a, b in itertools.product(members, members)
        }
        while True:  # Products of commutators.
            grown = {int(table[a, b]) for a, b in itertools.product(commutators, commutators)}
            if grown <= commutators:
                return commutators
            commutators |= grown

    for group, solvable in (("A5", False), ("A4xZ5", True), ("S3", True), ("Z60", True)):
        table = group_words.table(group)
        members, before = set(range(len(table))), None
        while members != before:
            before, members = members, derived(table, members)
        assert (len(members) == 1) == solvable, group


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: mqar.Mqar(length=63), "length=63 must be even"),
        (lambda: mqar.Mqar(length=16, num_pairs=5), "length=16"),
        (lambda: mqar.Mqar(vocab_size=64), "vocab_size=64"),
        (lambda: mqar.Mqar(filler="blank"), "filler='blank' must be one of"),
        (lambda: joint_recall.JointRecall(vocab_size=50), "vocab_size=50 must be at least 51"),
        (lambda: joint_recall.JointRecall(keys=(4, 3)), "keys="),
        (lambda: mad.InContextRecall(length=128), "length=128 must be odd"),
        (lambda: mad.InContextRecall(noise=0.2), "noise=0.2"),
        (lambda: needle.Needle(depth=1.5), "depth=1.5 must be in 0..1"),
        (lambda: ruler.CommonWords(often=3), "often=3 must be at least 4"),
        (lambda: group_words.GroupWords(group="A6"), "group='A6' must be one of"),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()
