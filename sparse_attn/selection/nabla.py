"""The smallest set of tiles with a part of the pooled mass, and a static window of tiles."""

import dataclasses

from sparse_attn.patterns import base as patterns_base
from sparse_attn.selection import base, pooled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nabla(pooled.Pooled):
    """Pooled softmax rows down to their mass `top_p`, united with `always`; for video.

    Neighborhood adaptive block-level attention [arXiv:2507.13546]; its threshold is
    `1 - top_p`. The paper's blocks are spatial tiles, `attend(..., order=reorder.Tiles(...))`, and
    its optional sliding tiles are `always`, such as `frame_tiles` or `neighborhood`, which are kept
    beside the chosen ones and do not count for them. Not causal; training or inference.

    >>> import jax
    >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 8))
    >>> jax.eval_shape(Nabla(block_q=16, block_kv=16, top_p=0.2).select, q, k).kv_counts.shape
    (1, 2, 4)
    """

    pattern: patterns_base.Pattern = base.EVERYTHING
    always: patterns_base.Pattern | None = None

    def keep(self, q, k, blocks):
        return super().keep(q, k, blocks._replace(guard=blocks.guard & False))


EXAMPLES = (Nabla(block_q=16, block_kv=16, top_p=0.5),)
