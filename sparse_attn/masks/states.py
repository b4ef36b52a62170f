"""The three states of a block, shared by patterns, masks and kernels."""

import enum


class BlockState(enum.IntEnum):
    """What a block of the mask holds: no visible pair, some, or all of them."""

    EMPTY = 0
    PARTIAL = 1
    FULL = 2
