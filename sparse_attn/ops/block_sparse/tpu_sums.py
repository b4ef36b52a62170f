"""Sums over the steps of a TPU kernel that stay in HBM: dk and dv by rows, dq by columns."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def scratch(parts: int, tile: int, width: int) -> dict[str, Any]:
    """What `Sums` needs of a kernel's scratch memory, for tiles `[tile, width]` float32."""
    return {
        "sums": pltpu.VMEM((2, parts, tile, width), jnp.float32),
        "reads": pltpu.SemaphoreType.DMA((2,)),
        "writes": pltpu.SemaphoreType.DMA((2,)),
        "book": pltpu.SMEM((3,), jnp.int32),
    }


class Sums:
    """Tiles in HBM that steps add to, read and written behind the computation.

    Two buffers: a step reads while the one before still writes. `book` holds the number of active
    steps so far, and which buffers have a write under way.
    """

    def __init__(self, refs, places):
        self.refs = refs
        self.places = places

    def _wait(self, semaphores, slot):
        """A copy is awaited by its size alone: one wait for all parts."""
        sums = self.refs.sums.at[slot]
        pltpu.make_async_copy(sums, sums, semaphores.at[slot]).wait()

    def _finish(self, slot):
        @pl.when(self.refs.book[1 + slot] == 1)
        def _():
            self._wait(self.refs.writes, slot)
            self.refs.book[1 + slot] = 0

    def begin(self, again):
        """Starts the reads of this step's tiles; `again`: the step before writes one of them."""
        refs = self.refs
        slot = refs.book[0] & 1
        self._finish(slot)
        pl.when(again)(lambda: self._finish(1 - slot))
        for i, place in enumerate(self.places):
            pltpu.make_async_copy(place, refs.sums.at[slot, i], refs.reads.at[slot]).start()

    def tiles(self):
        """The tiles `[parts, tile, width]`, to add to before `end`."""
        slot = self.refs.book[0] & 1
        self._wait(self.refs.reads, slot)
        return self.refs.sums.at[slot]

    def end(self):
        """Starts the writes."""
        refs = self.refs
        slot = refs.book[0] & 1
        for i, place in enumerate(self.places):
            pltpu.make_async_copy(refs.sums.at[slot, i], place, refs.writes.at[slot]).start()
        refs.book[0] += 1
        refs.book[1 + slot] = 1

    def reset(self):
        """Nothing under way; before the first step."""
        for i in range(3):
            self.refs.book[i] = 0

    def drain(self):
        """Waits for all writes; after the last step."""
        for slot in range(2):
            self._finish(slot)
