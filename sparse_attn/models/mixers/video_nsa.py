"""Native sparse attention for the queries of a video, dense attention for those of the text."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from sparse_attn.masks import block_mask, lower
from sparse_attn.models.mixers import nsa
from sparse_attn.parallel import attention as parallel_lib
from sparse_attn.patterns import base as patterns_base
from sparse_attn.patterns import causal, local, segmented


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoNsa(nsa.Nsa):
    """VideoNSA: queries are split by modality, all see all earlier tokens.  [arXiv:2510.02295]

    Text queries have dense causal attention, video queries the three branches of `nsa`. Keys and
    values are those of dense attention by default, so a trained model goes on from its weights, and
    a row without a video is what it was. Blocks of queries of a video take no dense work.

    Attributes:
      video: `(start, end)` of each video in the row, in tokens; all rows of a model are laid out
        alike.

    Raises:
      ValueError: `video` is not in order or not apart; and as `nsa`.

    >>> rule = VideoNsa(video=((16, 4112), (4120, 8216)), block_kv=32, stride=16, window=64)
    >>> int(rule.is_video(8216).sum())
    8192
    """

    keys: str = "shared"
    video: tuple[tuple, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "video", tuple(tuple(span) for span in self.video))
        super().__post_init__()
        edges = [at for span in self.video for at in span]
        if any(len(span) != 2 for span in self.video) or any(type(at) is not int for at in edges):
            raise ValueError(f"video={self.video} must be pairs of ints (start, end)")
        apart = all(a < b for a, b in self.video) and edges == sorted(edges)
        if not apart or min(edges, default=0) < 0:
            raise ValueError(f"video={self.video} must be spans in order that do not overlap")

    def is_video(self, length: int) -> np.ndarray:
        """Which tokens of a row are of a video, bool `[length]`."""
        at = np.arange(length)
        return np.any([(at >= a) & (at < b) for a, b in self.video] or [at < 0], axis=0)

    def text_rows(self, length: int) -> patterns_base.Pattern:
        """Causal for the queries of the text; those of a video see nothing."""
        if not self.is_video(length).any():
            return causal.Causal()
        edges = [min(at, length) for at in (0, *np.ravel(self.video).tolist(), length)]
        lengths = np.diff(edges).tolist()
        runs = [(("text", "video")[i % 2], n) for i, n in enumerate(lengths) if n]
        sees = [("text", kind) for kind in dict(runs) if "text" in dict(runs)]
        return segmented.Segmented(
            segments=tuple(runs), sees=tuple(sees), inside=(("video", None),)
        )

    def at_most(self, q_len: int, kv_len: int | None = None) -> block_mask.BlockMask:
        """Dense rows of text, and windows with as many keys as a query of a video reads at most."""
        size = min(q_len, self.most_keys(q_len))
        pattern = self.text_rows(q_len) | local.Local(window=size)
        return lower.lower(pattern, q_len=q_len, kv_len=kv_len)

    @property
    def _module(self):
        return VideoNativeSparseAttention


class VideoNativeSparseAttention(nsa.NativeSparseAttention):
    """Self-attention by a `VideoNsa`; parameters are those of `NativeSparseAttention`.

    >>> import jax
    >>> rule = VideoNsa(
    ...     video=((4, 16),), block_kv=8, top_k=3, window=8, compress_block=4, stride=4)
    >>> layer = rule.layer(num_heads=4, num_kv_heads=2, head_dim=8)
    >>> out, _ = jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 20, 32)))
    >>> out.shape
    (1, 20, 32)
    """

    def _branches(self, q, keys, segment_ids):
        outs = super()._branches(q, keys, segment_ids)
        outs["dense"] = parallel_lib.attend(
            q, *keys["selected"], mask=self.rule.text_rows(q.shape[1]),
            segment_ids=segment_ids, impl=self.impl, tokens=self.tokens,
        )  # fmt: skip
        return outs

    def _gated(self, x_BTD, outs):
        outs = dict(outs)
        dense = outs.pop("dense")
        sparse = super()._gated(x_BTD, outs)
        return jnp.where(self.rule.is_video(x_BTD.shape[1])[:, None, None], sparse, dense)


EXAMPLES = (VideoNsa(video=((5, 30),), block_kv=8, top_k=3, window=8, compress_block=4, stride=2),)
