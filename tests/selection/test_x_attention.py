"""XAttention: antidiagonal sums by brute force, what they see and what they cannot see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.ops import kept_mass
from sparse_attn.patterns import causal
from sparse_attn.selection import x_attention
from tests.selection import rules

BLOCK = 32


def rule(**fields):
    return x_attention.XAttention(block_q=BLOCK, block_kv=BLOCK, **fields)


@pytest.mark.parametrize("stride", [4, 5])
def test_scores_of_tiles_are_sums_over_antidiagonals(stride):
    q, k, _ = rules.inputs(batch=1, length=2 * stride, kv_len=3 * stride, heads=2, kv_heads=1)
    logits = np.einsum("btnh,bsh->bnts", q, k[:, :, 0]) / np.sqrt(8)
    want = np.zeros((1, 2, 2, 3))
    for i, j, offset in np.ndindex(2, 3, stride):
        row, column = i * stride + stride - 1 - offset, j * stride + offset
        want[:, :, i, j] += logits[:, :, row, column] / stride
    made = x_attention.XAttention(block_q=stride, block_kv=stride, stride=stride, top_k=1)
    np.testing.assert_allclose(made.antidiagonals(q, k), want, atol=1e-5)


def with_slash(distances, length=256):
    """One-hot q and k: token t attends to the tokens `distances` before it, and to nothing else."""
    eye = np.eye(length, dtype=np.float32)
    q = sum(np.roll(eye, -distance, axis=1) for distance in distances)
    return (jnp.asarray(x * 60)[None, :, None] for x in (q, eye))


@jax.jit
def all_scores(q, k):
    chosen = rule(top_k=1)
    return chosen.scores(q, k, chosen._blocks(np.ones((8, 8), int), q, k, None, None))


@pytest.mark.parametrize(
    "distances, seen", [((65,), True), ((64, 65), True), ((64,), False), ((70,), False)]
)
def test_a_diagonal_at_an_even_distance_is_invisible_unless_two_wide(distances, seen):
    q, k = with_slash(distances)
    scores = np.asarray(all_scores(q, k))[0, 0]
    on_it, off_it = scores[5, 3], scores[5, 1]  # 160 - 64 = 96 is the start of block 3.
    assert (on_it > off_it + 0.1) == seen
    if not seen:
        np.testing.assert_allclose(on_it, off_it, atol=1e-5)


def test_the_main_diagonal_is_invisible_and_kept_all_the_same():
    q, k = with_slash((0,))
    kept = rules.chosen(rule(top_k=1), q, k)[0, 0] > 0
    assert kept.diagonal().all()
    assert not (rules.chosen(rule(top_k=1, always=None), q, k)[0, 0] > 0).diagonal()[1:].any()


def test_planted_columns_and_diagonals_are_kept():
    length, dim, distance, width = 1024, 64, 129, 12
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, length, dim)) * 0.3
    q[:, 0] += 8
    k[96 : 96 + width, 0] += 8
    # What is random in both is alike at the distance, and nearly so at those around it.
    code = rng.standard_normal((length + distance + width - 1, dim - 1))
    code = np.apply_along_axis(np.convolve, 0, code, np.ones(width) / width**0.5, "valid")
    q[:, 1:] += 1.2 * code[:length]
    k[:, 1:] += 1.2 * code[distance:]
    q, k = (jnp.asarray(x, jnp.float32)[None, :, None] for x in (q, k))
    mask = rules.select(rule(top_p=0.9, stride=8), q, k)
    mass = kept_mass.kept_mass(q, k, mask, dense=causal.Causal())
    assert float(mass.mean()) >= 0.9
    assert float(kept_mass.density(mask, causal.Causal())[0, 0]) <= 0.3


def test_stride_must_divide_the_blocks():
    with pytest.raises(ValueError, match="stride=5 must divide block_q=32"):
        rule(stride=5, top_k=1)
