"""Heads that share out the past: each sees near blocks and every n-th earlier block."""

import dataclasses
from typing import ClassVar

from sparse_attn.patterns import base, block_local, per_head


@dataclasses.dataclass(frozen=True)
class Sharded(base.Pattern):
    """Near blocks, and of the earlier ones those whose number is `shard` modulo `stride`; causal.

    One head of sparsely-sharded attention  [arXiv:2407.17678]. The blocks of a shard stand at
    absolute positions: a key of another shard that has left the near blocks is never read again,
    so a cache may drop it. `heads` gives every shard to a head.

    Attributes:
      size: tokens of a block.
      stride: number of shards.
      shard: the shard of this head, in `[0, stride)`.
      local_blocks: near blocks that are seen whole, the query's own included.

    Raises:
      ValueError: a field is not in its range.

    >>> import numpy as np
    >>> np.flatnonzero(Sharded(size=2, stride=3, shard=1).mask_fn(np.int32(12), np.arange(20)))
    array([ 2,  3,  8,  9, 12])
    """

    size: int
    stride: int
    shard: int
    local_blocks: int = 1

    block_state_exact: ClassVar[bool] = True

    def __post_init__(self):
        base.check_int("size", self.size)
        base.check_int("stride", self.stride)
        base.check_int("shard", self.shard, least=0, most=self.stride - 1)
        base.check_int("local_blocks", self.local_blocks)
        base.check_int("size * stride", self.size * self.stride)

    @property
    def _local(self) -> block_local.BlockLocal:
        return block_local.BlockLocal(size=self.size, before=self.local_blocks - 1)

    def mask_fn(self, q_pos, kv_pos):
        mine = kv_pos // self.size % self.stride == self.shard
        return self._local.mask_fn(q_pos, kv_pos) | (mine & (kv_pos <= q_pos))

    def block_state(self, q_lo, q_hi, kv_lo, kv_hi):
        q_first, q_last = q_lo // self.size, (q_hi - 1) // self.size
        kv_first, kv_last = kv_lo // self.size, (kv_hi - 1) // self.size
        # The first key of the shard, and the first block of another one.
        to_mine = (self.shard - kv_first) % self.stride
        key = base.greatest((kv_first + to_mine) * self.size, kv_lo)
        others = kv_first + 1 * (to_mine == 0)
        all_near = q_last - others < self.local_blocks
        none_near = q_first - kv_last >= self.local_blocks
        return base.state_of(
            empty=(kv_lo > q_hi - 1) | (none_near & ((key >= kv_hi) | (key > q_hi - 1))),
            full=(kv_hi - 1 <= q_lo) & ((self.stride == 1) | (others > kv_last) | all_near),
        )

    @property
    def causal(self) -> bool:
        return True


def heads(
    size: int, stride: int, *, local_blocks: int = 1, queries_per_kv: int = 1
) -> per_head.PerHead:
    """One KV head per shard: together they see every earlier block  [arXiv:2407.17678].

    Heads are dealt out in turn, so the number of KV heads must be a multiple of `stride`.

    Args:
      size, stride, local_blocks: as in `Sharded`.
      queries_per_kv: query heads that share a KV head; they share the shard, so that the KV
        head's cache holds that shard only.

    Raises:
      ValueError: an argument is not in its range.

    >>> [p.shard for p in heads(64, 3, queries_per_kv=2).patterns]
    [0, 0, 1, 1, 2, 2]
    """
    base.check_int("stride", stride)
    base.check_int("queries_per_kv", queries_per_kv)
    shards = (Sharded(size, stride, shard, local_blocks) for shard in range(stride))
    return per_head.PerHead(tuple(s for s in shards for _ in range(queries_per_kv)))


EXAMPLES = (
    Sharded(size=4, stride=3, shard=2),
    Sharded(size=16, stride=4, shard=0, local_blocks=2),
    Sharded(size=1, stride=7, shard=5, local_blocks=3),
    Sharded(size=9, stride=1, shard=0),
)
