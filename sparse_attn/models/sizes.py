"""Decoders by size: shapes of a `TransformerConfig` whose number of parameters is the name's.

With the vocabulary of bytes nearly all parameters are those of the layers. A head dimension of 128
fills the matrix units; widths divide into 128 parts and layers into cycles of 2.
"""

DECODERS = {
    "10m": dict(
        num_layers=6, embed_dim=384, num_heads=6, num_kv_heads=2, head_dim=64, mlp_dim=1088
    ),
    "125m": dict(
        num_layers=20, embed_dim=768, num_heads=6, num_kv_heads=2, head_dim=128, mlp_dim=2048
    ),
    "350m": dict(
        num_layers=32, embed_dim=1024, num_heads=8, num_kv_heads=2, head_dim=128, mlp_dim=2688
    ),
    "1.3b": dict(
        num_layers=28, embed_dim=2048, num_heads=16, num_kv_heads=4, head_dim=128, mlp_dim=5888
    ),
}


def decoder(size: str) -> dict[str, int]:
    """Fields of `TransformerConfig` for a size: layers, width, heads, KV heads, head and MLP dim.

    Raises:
      ValueError: there is no such size.

    >>> decoder("125m")["num_layers"]
    20
    """
    if size not in DECODERS:
        raise ValueError(f"size={size!r} must be one of {', '.join(DECODERS)}")
    return dict(DECODERS[size])
