"""What the tests of single patterns share: pictures and densities."""

import jaxtyping
import numpy as np
import pytest

from sparse_attn.masks import stats


@pytest.fixture
def draw():
    """The 8 x 8 element mask of a pattern as lines of '#' (visible) and '.'."""

    def lines(pattern, q_len=8, kv_len=8):
        q_pos, kv_pos = np.arange(q_len, dtype=np.int32), np.arange(kv_len, dtype=np.int32)
        mask = pattern.mask_fn(q_pos[:, None], kv_pos[None, :])
        return ["".join("#" if seen else "." for seen in row) for row in mask]

    return lines


@pytest.fixture
def pairs():
    """The number of visible (query, key) pairs of a pattern at a length, from its block lists."""

    def count(pattern, q_len, block=16):
        counted = stats.of(pattern, q_len=q_len, block_q=block, block_kv=block)
        return round(counted.token_density * q_len * q_len)

    return count


@pytest.fixture
def unchecked():
    """Without the run-time type checks of the tests: what a user sees for a wrong type."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
