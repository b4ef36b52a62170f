import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_attn.masks import lower
from sparse_attn.ops import attend as attend_lib
from sparse_attn.patterns import causal, full, halo, local, segmented
from tests.patterns import exact, on_grid

Segmented = segmented.Segmented


def by_loop(pattern, length):
    """The element mask, segment by segment, from what the docstring says."""
    segments = [(kind, n) for kind, n, *c in pattern.segments for _ in range(*c or (1,))]
    kinds = [kind for kind, _ in segments]
    starts = np.append(0, np.cumsum([n for _, n in segments]))
    starts[-1] = max(length, starts[-1])  # The last segment has no end.
    inside = dict(pattern.inside)
    mask = np.zeros((starts[-1], starts[-1]), bool)
    for i, a in enumerate(kinds):
        rows = slice(starts[i], starts[i + 1])
        offsets = np.arange(starts[i + 1] - starts[i])
        rule = inside.get(a, causal.Causal())
        mask[rows, rows] = rule is not None and rule.mask_fn(offsets[:, None], offsets)
        for j, b in enumerate(kinds):
            for *pair, reach in ((*entry, None)[:3] for entry in pattern.sees):
                if i != j and pair == [a, b]:
                    nearer = kinds[j + 1 : i].count(b)  # Segments of that kind in between.
                    latest = j < i and (reach is None or (reach != "any" and nearer < reach))
                    mask[rows, starts[j] : starts[j + 1]] = reach == "any" or latest
    return mask[:length, :length]


def random_pattern(rng):
    kinds = list("abc")[: rng.integers(1, 4)]
    lengths = rng.integers(1, rng.choice([2, 5, 14], 14) + 1)
    segments = tuple((str(rng.choice(kinds)), int(n)) for n in lengths[: rng.integers(1, 15)])
    kinds = sorted({kind for kind, _ in segments})
    reaches = [(), (), (1,), (2,), ("any",)]
    sees = [(a, b, *reaches[rng.integers(5)]) for a in kinds for b in kinds if rng.random() < 0.5]
    grid = halo.Halo(shape=(2, 3), block=1, halo=1)
    rules = [None, causal.Causal(), full.Full(), local.Local(window=1), local.Local(window=3), grid]
    inside = [(a, rules[rng.integers(6)]) for a in kinds if rng.random() < 0.7]
    return Segmented(segments, tuple(sees), tuple(inside))


@hypothesis.given(st.integers(0, 2**32 - 1))
def test_any_fields_are_the_loop(seed):
    rng, length = np.random.default_rng(seed), 60
    pattern = random_pattern(rng)
    want = by_loop(pattern, length)
    np.testing.assert_array_equal(on_grid.dense(pattern, length), want)
    assert not (pattern.causal and np.triu(want, 1).any())
    assert pattern.may_be_empty or want.any(1).all()
    # Every rectangle of a few hundred has its exact state.
    lo = rng.integers(0, length, (2, 300))
    hi = np.minimum(lo + rng.choice([1, 2, 9, 40], (2, 300)), length)
    parts = [want[a:b, c:d] for (a, c), (b, d) in zip(lo.T, hi.T, strict=True)]
    truth = [2 if x.all() else int(x.any()) for x in parts]
    assert pattern.block_state_exact
    np.testing.assert_array_equal(pattern.block_state(lo[0], hi[0], lo[1], hi[1]), truth)


def test_a_hidden_pair_inside_one_whole_segment():
    everyone = tuple((a, b, "any") for a in "ab" for b in "ab")
    pattern = Segmented((("a", 1), ("b", 3), ("a", 1)), everyone)
    assert int(pattern.block_state(0, 5, 0, 5)) == 1
    whole = Segmented(pattern.segments, everyone, (("b", full.Full()),))
    assert int(whole.block_state(0, 5, 0, 5)) == 2
    nothing = Segmented((("a", 1), ("b", 3), ("a", 1)), (), (("a", None),))
    assert int(nothing.block_state(0, 5, 0, 5)) == 1
    assert int(Segmented((("a", 2), ("a", 1)), (), (("a", None),)).block_state(0, 3, 0, 3)) == 0


@pytest.mark.parametrize(
    "pattern, picture",
    [
        (
            segmented.block_rank(1, [2, 3], 2),
            ["#.......", "##......", "###.....", "#..#....", "#..##...", "#..###..", "#######.",
             "########"],
        ),
        (
            segmented.block_attention([3, 3], 2),
            ["#.......", "##......", "###.....", "...#....", "...##...", "...###..", "#######.",
             "########"],
        ),
        (
            segmented.many_shot(1, [2, 2, 2], 1, look_back=1),
            ["#.......", "##......", "###.....", "####....", "#####...", "#..###..", "#..####.",
             "########"],
        ),
        (
            segmented.arrow(3, [2, 3]),
            ["########", "########", "########", "#####...", "#####...", "###..###", "###..###",
             "###..###"],
        ),
        (
            segmented.multimodal(("text", 1), ("visual", 3), ("text", 2), ("visual", 2)),
            ["#.......", ".#......", "..#.....", "...#....", "#####...", "######..", "......#.",
             ".......#"],
        ),
        (
            segmented.near_visual(("text", 1), ("visual", 6), ("text", 1), shape=(3, 2), radius=1),
            ["#.......", "##......", "###.....", "####....", "#####...", "#..###..", "#..####.",
             "########"],
        ),
    ],
    ids=["block_rank", "block_attention", "many_shot", "arrow", "multimodal", "near_visual"],
)  # fmt: skip
def test_pictures(pattern, picture, draw):
    assert draw(pattern) == picture


def parts_of(lengths):
    ends = np.cumsum(lengths)
    return [np.arange(end - n, end) for end, n in zip(ends, lengths, strict=True)]


def hidden(seed, length):
    return np.random.default_rng(seed).normal(size=(length, 16))


def test_documents_to_rank_do_not_depend_on_one_another():
    """All documents begin at the position behind the instruction, the query behind the longest."""
    lengths = [5, 8, 3, 11, 6]  # instruction, documents, query

    def run(x, order):
        n = [lengths[i] for i in order]
        offsets = np.concatenate(
            [np.arange(n[0]), *(n[0] + np.arange(m) for m in n[1:-1]), 16 + np.arange(n[-1])]
        )
        pattern = segmented.block_rank(n[0], n[1:-1], n[-1])
        whole = np.concatenate([x[i] for i in order])
        out = exact.model(whole, offsets, on_grid.dense(pattern, len(whole)))
        return {i: out[at] for i, at in zip(order, parts_of(n), strict=True)}

    x = [hidden(i, n) for i, n in enumerate(lengths)]
    before, shuffled = run(x, [0, 1, 2, 3, 4]), run(x, [0, 3, 1, 2, 4])
    for i in range(5):
        np.testing.assert_allclose(before[i], shuffled[i], atol=1e-10)
    other = run([*x[:2], hidden(9, 3), *x[3:]], [0, 1, 2, 3, 4])
    for i in (0, 1, 3):
        np.testing.assert_array_equal(before[i], other[i])
    assert not np.allclose(before[4], other[4])


def test_blocks_grow_linearly_with_the_documents():
    blocks = []
    for documents in (1000, 2000, 4000):
        pattern = segmented.block_rank(128, [256] * documents, 128)
        mask = lower.lower(pattern, q_len=256 + 256 * documents)
        blocks.append(int(mask.kv_counts.sum()))
    assert mask.q_len > 1 << 19
    assert blocks[2] - blocks[1] == 2 * (blocks[1] - blocks[0])
    # Instruction and query: 1 and 2 n + 2; a document of two blocks: 3 and the instruction twice.
    assert blocks[0] == 1 + (2000 + 2) + 1000 * (3 + 2)


def test_attention_mass_ranks_documents():
    """One-hot values give the mass on each document; a contrastive loss raises one of them."""
    lengths, planted = [4, 6, 6, 6, 6, 5], 2
    pattern = segmented.block_rank(4, lengths[1:5], 5)
    total = sum(lengths)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, total, 2, 8))
    of_document = np.repeat(np.eye(6, dtype=np.float32), lengths, 0)
    values = jnp.broadcast_to(of_document[:, None], (1, total, 2, 6))

    def mass(q):
        return attend_lib.attend(q, k, values, mask=pattern)[0, -1, :, 1:5].mean(0)

    def loss(q):
        m = mass(q)
        return -jnp.log(m[planted] / m.sum()), m

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, first), gradient = step(q)
    want = exact.attention(q[0], k[0], values[0], on_grid.dense(pattern, total))
    np.testing.assert_allclose(first, want[-1, :, 1:5].mean(0), atol=1e-6)
    for _ in range(20):
        (_, last), gradient = step(q)
        assert np.isfinite(gradient).all()
        q = q - 2.0 * gradient
    assert first.argmax() != planted
    assert last.argmax() == planted


def test_cached_passages_serve_any_prompt():
    """Keys cached at offset zero and rotated to where they stand are those of the one pass."""
    passages, question = {"a": hidden(0, 7), "b": hidden(1, 12), "c": hidden(2, 5)}, hidden(3, 4)
    weights = [exact.projections(i) for i in range(2)]

    def causal_layers(x, past=None):
        """Hidden states, and each layer's unrotated-offset keys and values; `past` come first."""
        cache = []
        for i, w in enumerate(weights):
            q, k, v = np.einsum("td,pdnh->ptnh", x, w)
            start = 0 if past is None else len(past[i][0])
            at = start + np.arange(len(x))
            q, k = exact.rope(q, at), exact.rope(k, at)
            cache.append((k, v))
            if past is not None:
                k, v = (np.concatenate(y) for y in zip(past[i], (k, v), strict=True))
            seen = np.arange(len(k)) <= at[:, None]
            x = x + exact.attention(q, k, v, seen).reshape(x.shape)
        return x, cache

    caches = {name: causal_layers(x)[1] for name, x in passages.items()}  # Once, for all requests.
    for order in ("abc", "cab", "bb", "a"):
        sizes = [len(passages[name]) for name in order]
        offsets = np.cumsum(sizes) - sizes
        past = [
            tuple(
                np.concatenate([
                    exact.rope(caches[n][i][0], np.full(size, offset)) if part == 0
                    else caches[n][i][1]
                    for n, size, offset in zip(order, sizes, offsets, strict=True)
                ])
                for part in (0, 1)
            )
            for i in range(2)
        ]  # fmt: skip
        got, _ = causal_layers(question, past)  # Only the tokens of the question are computed.
        x = np.concatenate([*(passages[name] for name in order), question])
        pattern = segmented.block_attention(sizes, len(question))
        want = exact.model(x, np.arange(len(x)), on_grid.dense(pattern, len(x)))
        np.testing.assert_allclose(got, want[-len(question) :], atol=1e-10)


def test_one_block_is_causal():
    mask = on_grid.dense(Segmented((("passage", 9),)), 20)
    np.testing.assert_array_equal(mask, np.tri(20, dtype=bool))


def test_groups_that_look_back_far_enough_are_causal():
    mask = on_grid.dense(segmented.many_shot(4, [4] * 5, 6, look_back=4), 30)
    np.testing.assert_array_equal(mask, np.tri(30, dtype=bool))
    nearer = on_grid.dense(segmented.many_shot(4, [4] * 5, 6, look_back=3), 30)
    assert not nearer[20:24, 4:8].any()
    assert nearer.sum() == mask.sum() - 16


def test_encoding_more_groups_leaves_the_others(pairs):
    """Groups before are untouched, and a new group costs the same however many there are."""
    group, look_back, number = 16, 2, 50
    few, many = (segmented.many_shot(16, [16] * n, 1, look_back=2) for n in (20, number))
    length = 16 * 21
    np.testing.assert_array_equal(on_grid.dense(few, length), on_grid.dense(many, length))
    keys = on_grid.dense(many, 16 * (number + 1)).sum(1).reshape(-1, 16)
    assert (keys[3:] == keys[3]).all()
    # About (1/2 + look_back + sink) * group / length of all pairs.
    total = group * (number + 1)
    density = pairs(many, total) / total**2
    assert density == pytest.approx((0.5 + look_back + 1) * group / total, rel=0.05)


def test_candidates_are_ranked_in_one_pass(pairs):
    context, candidates = 9, [4, 7, 2]
    arrow = segmented.arrow(context, candidates)
    total = context + sum(candidates)
    squares = sum(n * n for n in candidates)
    assert pairs(arrow, total) == context**2 + 2 * context * sum(candidates) + squares
    # With the context alone in its rows, every candidate is as in a pass of its own.
    x = [hidden(i, n) for i, n in enumerate([context, *candidates])]
    alone = Segmented(arrow.segments, (("candidate", "context"),), arrow.inside)

    def run(order, pattern):
        n = [len(x[i]) for i in order]
        offsets = np.concatenate([np.arange(n[0]), *(n[0] + np.arange(m) for m in n[1:])])
        whole = np.concatenate([x[i] for i in order])
        segments = (("context", n[0]), *(("candidate", m) for m in n[1:]))
        mask = on_grid.dense(Segmented(segments, pattern.sees, pattern.inside), len(whole))
        out = exact.model(whole, offsets, mask)
        return {i: out[at] for i, at in zip(order, parts_of(n), strict=True)}

    together = run([0, 1, 2, 3], alone)
    for i in (1, 2, 3):
        np.testing.assert_allclose(together[i], run([0, i], alone)[i], atol=1e-10)
    # Both ways: another order of the candidates is another order of the outputs.
    first, second = run([0, 1, 2, 3], arrow), run([0, 3, 1, 2], arrow)
    for i in range(4):
        np.testing.assert_allclose(first[i], second[i], atol=1e-10)


@pytest.mark.parametrize("visual", [None, segmented.ITSELF], ids=["nothing", "itself"])
def test_no_attention_among_visual_tokens(visual):
    text, images = 13, 20
    pattern = segmented.multimodal(("visual", images), ("text", text), visual=visual)
    mask = on_grid.dense(pattern, images + text)
    itself = 0 if visual is None else images
    assert mask.sum() == text * images + text * (text + 1) // 2 + itself
    np.testing.assert_array_equal(mask[images:], np.tri(33, dtype=bool)[images:])
    np.testing.assert_array_equal(mask[:images], np.eye(images, 33, dtype=bool) & (itself > 0))
    # Rows of text are those of dense causal attention over the same keys.
    q, k, v = np.random.default_rng(0).normal(size=(3, 33, 2, 8))
    want = exact.attention(q, k, v, np.tri(33, dtype=bool))
    np.testing.assert_allclose(exact.attention(q, k, v, mask)[images:], want[images:])


def test_visual_tokens_that_see_nothing_are_zero():
    pattern = segmented.multimodal(("text", 3), ("visual", 10), ("text", 4), visual=None)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 17, 2, 8))
    out = jax.jit(lambda k, v: attend_lib.attend(q, k, v, mask=pattern)[0])(k, v)
    assert (out[3:13] == 0).all()
    want = exact.attention(q[0], k[0], v[0], on_grid.dense(pattern, 17))
    np.testing.assert_allclose(out, want, atol=1e-5)


@pytest.mark.parametrize("radius", [1, 2, 9])
def test_visual_tokens_see_their_neighbours(radius):
    """Two images of 4 rows; the last column holds the token that ends each row."""
    rows, columns, layout = 4, 6, [("text", 5), ("visual", 24), ("text", 3), ("visual", 24)]
    pattern = segmented.near_visual(*layout, ("text", 2), shape=(rows, columns), radius=radius)
    tokens = [("text", i, 0, 0) for i in range(5)]
    tokens += [("visual", 0, *divmod(i, columns)) for i in range(24)]
    tokens += [("text", i, 0, 0) for i in range(3)]
    tokens += [("visual", 1, *divmod(i, columns)) for i in range(24)]
    tokens += [("text", i, 0, 0) for i in range(2)]
    want = np.tri(len(tokens), dtype=bool)
    for i, (kind, image, row, column) in enumerate(tokens):
        for j, (other, other_image, r, c) in enumerate(tokens):
            if kind == other == "visual":
                near = max(abs(row - r), abs(column - c)) <= radius
                want[i, j] &= near and image == other_image
    np.testing.assert_array_equal(on_grid.dense(pattern, len(tokens)), want)
    if radius >= max(rows, columns):  # One image: dense causal attention.
        one = segmented.near_visual(*layout[:3], shape=(rows, columns), radius=radius)
        np.testing.assert_array_equal(on_grid.dense(one, 32), np.tri(32, dtype=bool))
    if radius == 1:  # Inside: the token, one to its left and three above it.
        assert want[5 + 8, 5:29].sum() == ((2 * radius + 1) ** 2 + 1) // 2


def test_lengths_known_at_run_time():
    """One pattern on slots serves batch entries of other lengths, with padding behind them."""
    slots = segmented.block_rank(8, [16] * 4, 8)
    lengths, total = np.array([[3, 16, 2, 9, 1, 5], [8, 4, 4, 0, 7, 8]]), 40
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, total, 2, 8))

    @jax.jit
    def run(lengths):
        places = slots.positions(lengths, length=total)
        exists = jnp.arange(total) < lengths.sum(1)[:, None]
        return attend_lib.attend(
            q, k, v, mask=slots, positions=places, segment_ids=exists.astype(jnp.int32)
        )

    got = run(jnp.asarray(lengths))
    for entry, n in enumerate(lengths.tolist()):
        packed = segmented.block_rank(n[0], [m for m in n[1:-1] if m], n[-1])
        at = slice(sum(n))
        want = exact.attention(
            q[entry, at], k[entry, at], v[entry, at], on_grid.dense(packed, sum(n))
        )
        np.testing.assert_allclose(got[entry, at], want, atol=1e-5)
        assert (got[entry, sum(n) :] == 0).all()


def test_equal_segments_are_stored_as_one_run():
    listed = Segmented((("a", 3), ("b", 2), ("b", 2), ("b", 2, 4)))
    assert listed == Segmented((("a", 3, 1), ("b", 2, 6)))
    assert listed.segments == (("a", 3), ("b", 2, 6))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"segments": ()}, "must have one segment or more"),
        ({"segments": ((3, 4),)}, r"segments=\(3, 4\) must be \(kind, tokens\)"),
        ({"segments": (("a", 0),)}, r"segments=\('a', 0\)=0 must be an int >= 1"),
        ({"segments": (("a", 2**20, 2**11),)}, "tokens of all segments=2147483648"),
        ({"segments": (("a", 1),), "sees": (("a", "b"),)}, r"sees=\('a', 'b'\) must be two kinds"),
        ({"segments": (("a", 1),), "sees": (("a", "a", 0),)}, "=0 must be an int >= 1"),
        ({"segments": (("a", 1),), "sees": (("a", "a", "all"),)}, "='all' must be an int >= 1"),
        ({"segments": (("a", 1),), "sees": (("a", "a"), ("a", "a", 1))}, "one thing only once"),
        ({"segments": (("a", 1),), "inside": (("b", None),)}, r"inside=\('b', None\) must be"),
        ({"segments": (("a", 1),), "inside": (("a", 3),)}, r"inside=\('a', 3\) must be"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Segmented(**fields)


def test_multimodal_has_two_kinds():
    with pytest.raises(ValueError, match="must be of kinds 'text' and 'visual'"):
        segmented.multimodal(("text", 3), ("image", 4))
