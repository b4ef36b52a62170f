import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_attn.masks import lower
from sparse_attn.models import attention
from sparse_attn.ops import attend as attend_lib
from sparse_attn.patterns import ancestors, causal, full
from tests.patterns import exact, on_grid

Ancestors = ancestors.Ancestors


def climb(parents, tokens):
    """The element mask by walking from every token to the root."""
    node = np.repeat(np.arange(len(parents)), tokens)
    mask = np.zeros((len(node), len(node)), bool)
    for token, own in enumerate(node):
        mask[token, : token + 1] = node[: token + 1] == own
        while (own := parents[own]) >= 0:
            mask[token, node == own] = True
    return mask


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_picture(draw):
    tree = Ancestors(parents=(-1, 0, 0, 1, 1), tokens=(2, 1, 1, 2, 2))
    assert draw(tree) == [
        "#.......",
        "##......",
        "###.....",
        "##.#....",
        "###.#...",
        "###.##..",
        "###...#.",
        "###...##",
    ]


def random_tree(rng, nodes, in_order):
    parents = [-1]
    for node in range(1, nodes):
        if in_order:  # A node hangs below the one before it, or below one of its ancestors.
            path = [node - 1]
            while path[-1] >= 0:
                path.append(parents[path[-1]])
            parents.append(int(rng.choice(path)))
        else:
            parents.append(int(rng.integers(-1, node)))
    return tuple(parents)


@hypothesis.given(
    st.integers(0, 2**32 - 1), st.integers(1, 16), st.sampled_from([1, 2, 9]), st.booleans()
)
def test_tokens_see_exactly_their_ancestors(seed, nodes, most, in_order):
    rng = np.random.default_rng(seed)
    parents = random_tree(rng, nodes, in_order)
    length = 160  # One shape, so that every operation of JAX is compiled once.
    tokens = rng.integers(1, most, nodes, endpoint=True)
    tokens[-1] += length - tokens.sum()
    tokens = tuple(tokens.tolist())
    tree, want = Ancestors(parents, tokens), climb(parents, tokens)
    np.testing.assert_array_equal(on_grid.dense(tree, length), want)
    np.testing.assert_array_equal(tree.depth(np.arange(length)), want.sum(1) - 1)
    position = jnp.arange(length)
    np.testing.assert_array_equal(tree.mask_fn(position[:, None], position), want)
    # Any ranges: conservative, and exact where every node is followed by its subtree.
    assert tree.block_state_exact or not in_order
    lo = rng.integers(0, length, (4, 100))
    (q_lo, kv_lo), (q_hi, kv_hi) = (
        lo[:2],
        np.minimum(lo[:2] + rng.integers(1, 20, (2, 100)), length),
    )
    parts = [want[a:b, c:d] for a, b, c, d in zip(q_lo, q_hi, kv_lo, kv_hi, strict=True)]
    truth = np.array([2 if x.all() else int(x.any()) for x in parts])
    state = tree.block_state(q_lo, q_hi, kv_lo, kv_hi)
    loose = state != truth
    assert (state[loose] == 1).all()
    assert not (tree.block_state_exact and loose.any())


def test_the_last_node_has_no_end():
    tree = Ancestors(parents=(-1, 0, 0), tokens=(3, 2, 1))
    longer = Ancestors(parents=(-1, 0, 0), tokens=(3, 2, 7))
    np.testing.assert_array_equal(on_grid.dense(tree, 12), on_grid.dense(longer, 12))
    # Also where the open branch is not the last one of its siblings.
    tree, longer = (Ancestors((-1, 0, 0, 1), (1, 1, 1, n)) for n in (1, 5))
    np.testing.assert_array_equal(on_grid.dense(tree, 8), on_grid.dense(longer, 8))


def test_drafts_are_verified_behind_a_long_prefix():
    """The prefix without a mask, the tree under its own, merged: dense under the whole mask."""
    rng, prefix, nodes = np.random.default_rng(0), 90, 32
    parents, depth = [-1], [1]
    while len(parents) < nodes:
        parent = int(rng.integers(-1, len(parents)))
        if parent < 0 or depth[parent] < 6:
            parents.append(parent)
            depth.append(1 + (0 if parent < 0 else depth[parent]))
    q = normal(0, 1, nodes, 4, 16)
    k, v = normal(1, 2, 1, prefix + nodes, 2, 16)

    @jax.jit
    def run(q, k, v):
        parts = [
            attend_lib.attend(q, k[:, at], v[:, at], mask=mask, return_lse=True)
            for at, mask in (
                (slice(prefix), full.Full()), (slice(prefix, None), Ancestors(tuple(parents))),
            )
        ]  # fmt: skip
        return attend_lib.merge_lse(parts)[0]

    mask = np.concatenate([np.ones((nodes, prefix), bool), climb(parents, [1] * nodes)], 1)
    k_heads, v_heads = (np.repeat(x[0], 2, 1) for x in (k, v))
    want = exact.attention(q[0], k_heads, v_heads, mask)
    np.testing.assert_allclose(run(q, k, v)[0], want, atol=1e-5)


def test_decoding_with_shared_prefixes():
    """One query per sequence; keys of a prefix are there once, whatever the batch.

    Two levels of prefixes, one sequence behind the first level, suffixes of no token at all.
    """
    parents, slots = (-1, 0, 1, 1, 0, 4, 4, 0), (16, 8, 8, 8, 8, 8, 8, 8)
    lengths, leaves = (13, 8, 0, 3, 2, 7, 1, 5), (2, 3, 5, 6, 7)
    tree, total = Ancestors(parents, slots), sum(lengths)
    k, v = normal(0, 2, 1, total, 2, 16)
    q = normal(1, 1, len(leaves), 2, 16)
    places = tree.positions(np.array(lengths), length=total)
    starts = np.cumsum(slots) - slots
    q_places = np.array([starts[i] + max(lengths[i] - 1, 0) for i in leaves], np.int32)
    q_places = jnp.asarray(q_places)
    run = jax.jit(lambda *qkv: attend_lib.attend(*qkv, mask=tree, positions=(q_places, places)))
    got, (q, k, v) = run(q, k, v)[0], map(np.asarray, (q, k, v))
    node = np.repeat(np.arange(len(lengths)), lengths)
    for i, leaf in enumerate(leaves):
        path = [leaf]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        own = np.isin(node, path)
        want = exact.attention(q[0, i : i + 1], k[0, own], v[0, own], True)
        np.testing.assert_allclose(got[i : i + 1], want, atol=1e-5)


@pytest.mark.parametrize("lengths", [(5,), (7, 1, 12, 3), (2, 9, 4, 4, 1, 6, 3, 8)])
def test_shared_prefix_is_the_repeated_prompt(lengths):
    prefix = 20
    pattern = ancestors.shared_prefix(prefix, lengths)
    x = np.random.default_rng(1).normal(size=(prefix + sum(lengths), 16))  # P + sum(R), not G * P
    got = exact.model(x, pattern.depth(np.arange(len(x))), on_grid.dense(pattern, len(x)))
    for end, n in zip(prefix + np.cumsum(lengths), lengths, strict=True):
        own = np.concatenate([x[:prefix], x[end - n : end]])
        want = exact.model(own, np.arange(len(own)), np.tri(len(own), dtype=bool))
        np.testing.assert_allclose(got[end - n : end], want[prefix:], atol=1e-10)
        np.testing.assert_allclose(got[:prefix], want[:prefix], atol=1e-10)


def test_gradients_of_a_shared_prefix_are_those_of_the_repeated_prompt():
    """With grouped heads and rotary positions; the prefix gets the sum over its copies."""
    prefix, response, groups = 12, 6, 3  # Equal responses: the copies are one batch.
    pattern = ancestors.shared_prefix(prefix, [response] * groups)
    depth = jnp.asarray(pattern.depth(np.arange(prefix + groups * response)))[None]
    weights = [normal(i, 16, n, 8) / 4 for i, n in enumerate((4, 2, 2))]
    x = normal(9, 1, prefix + groups * response, 16)

    def layer(weights, x, positions, mask):
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, w) for w in weights)
        q, k = (attention.rope(y, positions) for y in (q, k))
        return attend_lib.attend(q, k, v, mask=mask)

    def once(weights, x):
        return layer(weights, x, depth, pattern)[:, prefix:].reshape(groups, response, 4, 8)

    def repeated(weights, x):
        prompts = jnp.broadcast_to(x[:, :prefix], (groups, prefix, 16))
        rows = jnp.concatenate([prompts, x[0, prefix:].reshape(groups, response, 16)], 1)
        positions = jnp.broadcast_to(jnp.arange(prefix + response), rows.shape[:2])
        return layer(weights, rows, positions, causal.Causal())[:, prefix:]

    @jax.jit
    def results(weights, x):
        cotangent = jnp.sin(jnp.arange(groups * response * 32.0)).reshape(groups, response, 4, 8)
        return [
            (out, pull(cotangent))
            for out, pull in (jax.vjp(run, weights, x) for run in (once, repeated))
        ]

    got, want = (jax.tree.leaves(r) for r in results(weights, x))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_responses_do_not_depend_on_one_another():
    pattern = ancestors.shared_prefix(8, [4, 6, 5])
    q, k, v = normal(0, 3, 1, 23, 2, 8)
    run = jax.jit(lambda k, v: attend_lib.attend(q, k, v, mask=pattern)[0])
    other_k, other_v = np.array(k), np.array(v)
    other_k[:, 12:18], other_v[:, 12:18] = 0.5, 2.0
    changed = (np.asarray(run(k, v)) != np.asarray(run(other_k, other_v))).any((1, 2))
    assert changed[12:18].all()
    assert not changed[:12].any()  # Bit for bit.
    assert not changed[18:].any()


def test_shared_prefix_density(pairs):
    prefix, branches = 40, [5, 17, 8]
    own = sum(n * (n + 1) // 2 + prefix * n for n in branches)
    pattern = ancestors.shared_prefix(prefix, branches)
    assert pairs(pattern, 70) == prefix * (prefix + 1) // 2 + own


@pytest.mark.parametrize("documents", [[30], [1, 9, 20], [17, 2, 8, 3]])
def test_shared_anchor(documents, pairs):
    length = sum(documents)
    document = np.repeat(np.arange(len(documents)), documents)
    token = np.arange(length)
    own = (document[:, None] == document) & (token <= token[:, None])
    pattern = ancestors.shared_anchor(documents)
    np.testing.assert_array_equal(on_grid.dense(pattern, length), own | (token == 0))
    within = sum(n * (n + 1) // 2 for n in documents)
    assert pairs(pattern, length) == within + length - documents[0]
    if len(documents) == 1:
        np.testing.assert_array_equal(own | (token == 0), np.tri(length, dtype=bool))


def test_anchor_and_documents_keep_running_positions():
    """Each document sees the anchor at position 0 and itself where it stands in the sequence."""
    documents = [10, 7, 13]
    x = np.random.default_rng(3).normal(size=(30, 16))
    got = exact.model(x, np.arange(30), on_grid.dense(ancestors.shared_anchor(documents), 30))
    for end, n in zip(np.cumsum(documents), documents, strict=True):
        at = np.unique(np.append(0, np.arange(end - n, end)))
        want = exact.model(x[at], at, np.tri(len(at), dtype=bool))
        np.testing.assert_allclose(got[end - n : end], want[-n:], atol=1e-10)


def test_documents_known_at_run_time():
    """One pattern on slots serves batch entries packed in different ways."""
    slots = ancestors.shared_prefix(1, [32] * 4)
    lengths = np.array([[1, 9, 0, 20, 4], [1, 30, 3, 0, 0]])
    q, k, v = normal(0, 3, 2, 34, 2, 8)

    @jax.jit
    def run(lengths):
        places = slots.positions(lengths, length=34)
        return attend_lib.attend(q, k, v, mask=slots, positions=places)

    got, (q, k, v) = run(jnp.asarray(lengths)), map(np.asarray, (q, k, v))
    for entry, counts in enumerate(lengths):
        packed = ancestors.shared_prefix(1, [int(n) for n in counts[1:] if n])
        want = exact.attention(q[entry], k[entry], v[entry], on_grid.dense(packed, 34))
        np.testing.assert_allclose(got[entry], want, atol=1e-5)


def test_a_million_tokens_of_ragged_documents():
    """Blocks per row do not grow with the length: the anchor's and the own document's."""
    counts = []
    for number in (1000, 4000):
        documents = (100 + np.random.default_rng(0).integers(0, 324, number)).tolist()
        mask = lower.lower(ancestors.shared_anchor(documents), q_len=sum(documents))
        counts.append(mask.kv_counts.sum() / mask.num_rows)
    assert sum(documents) > 1 << 20 - 1
    assert counts[1] < 6
    assert abs(counts[1] - counts[0]) < 0.2


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"parents": ()}, "must have one node or more"),
        ({"parents": (-1, 1)}, r"parents\[1\]=1 must be -1 or an int < 1"),
        ({"parents": (-1, -2)}, r"parents\[1\]=-2"),
        ({"parents": (-1, 0), "tokens": (3,)}, "tokens of 1 nodes must be for the 2 parents"),
        ({"parents": (-1, 0), "tokens": (3, 0)}, "each of tokens=0 must be an int >= 1"),
        ({"parents": (-1, 0), "tokens": 2**30}, "tokens of all nodes=2147483648"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Ancestors(**fields)
