import numpy as np
import pytest

from sparse_attn.masks import block_mask, curves, lower, reorder, stats, tables
from sparse_attn.patterns import causal, circular, local, neighborhood, permuted, swin

PATTERNS = (
    neighborhood.Neighborhood((7, 10), 3),
    swin.Swin((7, 10), 4, 2) & causal.Causal(),
    circular.Circular((7, 10), 2) | ~local.Local(window=60),
)


def permuted_mask(pattern, order):
    at = order.forward
    return pattern.mask_fn(at[:, None], at[None, :])


@pytest.mark.parametrize("blocks", [(8, 8), (16, 4), (7, 70), (128, 128)])
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.expression())
def test_blocks_and_bits_are_the_permuted_mask(pattern, blocks):
    order = curves.Gilbert((7, 10))
    want = permuted_mask(pattern, order)
    mask = tables.lower(pattern, order, block_q=blocks[0], block_kv=blocks[1])
    same = block_mask.from_array(want, block_q=blocks[0], block_kv=blocks[1])
    np.testing.assert_array_equal(block_mask.block_states(mask), block_mask.block_states(same))
    np.testing.assert_array_equal(stats.keys_per_row(mask), want.sum(1))
    for by_row in (True, False):
        got = dense_of_bits(mask, by_row=by_row)
        np.testing.assert_array_equal(got, want)


def dense_of_bits(mask, *, by_row):
    """The element mask, from the lists of one side and the bits."""
    side = "kv" if by_row else "q"
    starts, counts, indices, slots = (
        np.asarray(getattr(mask, f"{side}_{name}"))[0, 0]
        for name in ("starts", "counts", "indices", "bits")
    )
    out = np.zeros((mask.num_rows * mask.block_q, mask.num_cols * mask.block_kv), bool)
    for line, (start, count) in enumerate(zip(starts, counts, strict=True)):
        for other, slot in zip(indices[start : start + count], slots[start : start + count]):
            row, col = (line, other) if by_row else (other, line)
            rows = slice(row * mask.block_q, (row + 1) * mask.block_q)
            cols = slice(col * mask.block_kv, (col + 1) * mask.block_kv)
            out[rows, cols] = mask.bits[0, 0, slot]
    return out[: mask.q_len, : mask.kv_len]


def test_any_order_can_be_lowered_by_its_table():
    order, pattern = reorder.Tiles((8, 8), (4, 4)), neighborhood.Neighborhood((8, 8), 5)
    by_table = tables.lower(pattern, order, block_q=16, block_kv=16)
    by_rule = lower.lower(permuted.permute(pattern, order), q_len=64, block_q=16, block_kv=16)
    np.testing.assert_array_equal(
        block_mask.block_states(by_table), block_mask.block_states(by_rule)
    )


def test_lowering_is_cached():
    order, pattern = curves.Gilbert((6, 6)), swin.Swin((6, 6), 3)
    assert tables.lower(pattern, order) is tables.lower(pattern, order)
