"""What a model computes in, by the name that a config gives."""

from typing import Any

import jax.numpy as jnp

from sparse_attn.ops import tiles

CHOICES = {"auto": None, "float32": jnp.float32, "bfloat16": jnp.bfloat16}


def of(name: str) -> Any:
    """The dtype of a name in `CHOICES`; "auto" is float32 on CPU, else bfloat16.

    >>> of("bfloat16").__name__, of("auto").__name__  # on CPU
    ('bfloat16', 'float32')
    """
    if name != "auto":
        return CHOICES[name]
    return jnp.float32 if tiles.target().platform == "cpu" else jnp.bfloat16
