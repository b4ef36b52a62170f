"""Sparse attention in JAX: a pattern is one small file, executed by a few fast kernels."""

from sparse_attn import patterns
from sparse_attn.masks.block_mask import BlockMask
from sparse_attn.ops.attend import attend, merge_lse
from sparse_attn.patterns import Pattern

__all__ = [
    "BlockMask",
    "Pattern",
    "SelfAttention",
    "Transformer",
    "attend",
    "merge_lse",
    "patterns",
]


def __getattr__(name: str):
    # Flax is loaded by those who use a model, not by those who call `attend`.
    if name in ("SelfAttention", "Transformer"):
        from sparse_attn import models

        return getattr(models, name)
    raise AttributeError(f"module 'sparse_attn' has no attribute {name!r}")
