import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.ops import attend as attend_lib
from sparse_attn.ops import search
from sparse_attn.patterns import frame_tiles, full, global_tokens, halo, per_head

FRAMES, TOKENS = 6, 8
CANDIDATES = (
    full.Full(),
    halo.frame_diagonal(FRAMES, TOKENS, width=1),
    halo.frame_multi_diagonal(FRAMES, TOKENS, width=1),
    global_tokens.GlobalTokens(tokens=8),
    None,
)
LENGTH = FRAMES * TOKENS
BLOCKS = {"q_len": LENGTH, "block_q": 2, "block_kv": 2}


def heads_that_attend(masks, seed=0):
    """q, k, v whose attention is nearly uniform on each mask and nearly nothing elsewhere."""
    rng = np.random.default_rng(seed)
    q = np.stack([np.where(m, 20.0, -20.0) for m in masks], 1)[None]  # logits, as keys are units
    k = np.broadcast_to(np.eye(LENGTH)[None, :, None], (1, LENGTH, len(masks), LENGTH))
    v = rng.normal(size=(1, LENGTH, len(masks), 8))
    scale = LENGTH**0.5  # attend divides by it
    return tuple(jnp.asarray(x, jnp.float32) for x in (q * scale, k, v))


def dense(pattern):
    at = np.arange(LENGTH)
    return np.broadcast_to(pattern.mask_fn(at[:, None], at[None, :]), (LENGTH, LENGTH))


def test_the_search_finds_the_pattern_that_made_each_head():
    q, k, v = heads_that_attend([dense(p) for p in CANDIDATES[:4]])
    error, cost = search.errors(q, k, v, CANDIDATES), search.costs(CANDIDATES, **BLOCKS)
    assert cost[0] == 1
    assert cost[-1] == 0
    assert search.cheapest(error, cost, cost_weight=1e-3).tolist() == [0, 1, 2, 3]
    assert (search.cheapest(error, cost, cost_weight=100.0) == 4).all()


def test_no_weight_on_the_cost_picks_dense():
    error = np.array([[0.0, 0.0], [0.0, 1e-6], [0.3, 0.2]])
    assert search.cheapest(error, np.array([1.0, 0.5, 0.1]), cost_weight=0.0).tolist() == [0, 0]


def test_heads_together_are_heads_alone():
    chosen = [CANDIDATES[i] for i in (1, 2, 1, 3)]
    q, k, v = heads_that_attend([dense(p) for p in chosen])
    together = attend_lib.attend(q, k, v, mask=per_head.PerHead(tuple(chosen)))
    for head, pattern in enumerate(chosen):
        one = slice(head, head + 1)
        alone = attend_lib.attend(q[:, :, one], k[:, :, one], v[:, :, one], mask=pattern)
        np.testing.assert_allclose(together[:, :, one], alone, atol=1e-5)


@pytest.mark.parametrize("references", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_layer_search_returns_the_number_of_reference_frames(references):
    made = frame_tiles.FrameTiles((FRAMES, TOKENS), references)
    candidates = [frame_tiles.FrameTiles((FRAMES, TOKENS), n) for n in (0, 1, 3, 6)]
    q, k, v = heads_that_attend([dense(made)] * 2)
    error, cost = search.errors(q, k, v, candidates), search.costs(candidates, **BLOCKS)
    found = search.cheapest_within(error, cost, most_error=1e-4)
    assert candidates[found].references == references
    with pytest.raises(ValueError, match=r"must be >= .*, the least of them"):
        search.cheapest_within(error, cost, most_error=-1.0)
