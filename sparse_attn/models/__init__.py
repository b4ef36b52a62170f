"""Flax (Linen) models around `attend`; the only folder that imports Flax.

>>> from sparse_attn import models
>>> models.TransformerConfig(vocab_size=256, num_layers=2).embed_dim
128
"""

from sparse_attn.models.attention import SelfAttention
from sparse_attn.models.transformer import Transformer, TransformerConfig
from sparse_attn.models.vit import VisionTransformer, VisionTransformerConfig

__all__ = [
    "SelfAttention",
    "Transformer",
    "TransformerConfig",
    "VisionTransformer",
    "VisionTransformerConfig",
]
