# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Pattern gallery
#
# A pattern says which keys a query may see. It is one small file in `sparse_attn/patterns/`; all
# of them are found here by themselves. Queries run from top to bottom, keys from left to right.

# %%
import importlib

import numpy as np
from matplotlib import pyplot

from sparse_attn import patterns
from sparse_attn.masks import stats
from sparse_attn.patterns import base, per_layer
from sparse_attn.viz import show

# %% [markdown]
# ## One pattern
#
# `print` draws a block map: full blocks cost no masking, partial ones evaluate the rule, empty ones
# cost nothing. In a notebook, a pattern as the last line of a cell does the same.

# %%
window = patterns.parse("local(window=96) | sinks(tokens=4)")
print(window)
counted = stats.of(window, q_len=512, block_q=64, block_kv=64)
assert counted.token_density < counted.block_density < 0.5

# %% [markdown]
# ## All patterns
#
# Of each file the example that is nearest to a quarter full, on 64 tokens, a pixel per pair of
# tokens. Patterns on grids count tokens row by row, through one grid after another.


# %%
def fullness(pattern):
    return stats.of(pattern, q_len=64).token_density


examples = {}
for name in patterns.discover():
    module = importlib.import_module(f"sparse_attn.patterns.{name}")
    found = [p for p in getattr(module, "EXAMPLES", ()) if isinstance(p, base.Pattern)]
    if found:
        examples[name] = min(found, key=lambda p: abs(fullness(p) - 0.25))
columns = 6
rows = -(-len(examples) // columns)
gallery, axes = pyplot.subplots(
    rows, columns, figsize=(2 * columns, 2.2 * rows), layout="constrained"
)
for axis in axes.ravel():
    axis.set_axis_off()
for axis, (name, example) in zip(axes.ravel(), examples.items(), strict=False):
    axis.imshow(show.image(example, 64, 1), interpolation="nearest")
    axis.set_title(name, fontsize=9)
assert len(examples) > 20

# %% [markdown]
# ## Composing
#
# `&`, `|` and `~` make new patterns of old ones. Big Bird is a window, global tokens and random
# blocks, below the diagonal.

# %%
big_bird = patterns.parse(
    "causal() & (local(window=64) | global_tokens(tokens=16) "
    "| random_blocks(block=64, num_blocks=1))"
)
assert patterns.parse(big_bird.expression()) == big_bird
show.show(big_bird, 1024, 64)

# %% [markdown]
# ## Heads and layers
#
# A `per_head` pattern has one rule per query head, a `per_layer` schedule one per layer. Each
# distinct one is drawn once.

# %%
schedule = patterns.parse(
    "per_layer((per_head((local(window=128), dilated(window=32, dilation=8))), causal()))"
)
assert isinstance(schedule, per_layer.PerLayer)
show.show(schedule, 1024, 64)

# %% [markdown]
# ## A million tokens
#
# Nothing here makes a T x S array: block lists hold the active blocks only.

# %%
long = patterns.parse("local(window=4096) | sinks(tokens=64)")
counted = stats.of(long, q_len=1 << 20)
print(f"{counted.active_blocks:,.0f} active blocks, block density {counted.block_density:.5f}")
assert counted.block_density < 0.005
show.show(long, 1 << 20)

# %% [markdown]
# ## A pattern of your own
#
# Subclass `Pattern`, define `mask_fn`, and everything on this page works. As a file in
# `sparse_attn/patterns/` with `EXAMPLES` it can be named in configs, and the tests find it.


# %%
class EverySquare(base.Pattern):
    """Keys that lie a square number of tokens back."""

    def mask_fn(self, q_pos, kv_pos):
        back = q_pos - kv_pos
        root = (np.maximum(back, 0) ** 0.5).round().astype(np.int32)
        return (back >= 0) & (root * root == back)


pixels = show.image(EverySquare(), 64, 1)
assert (pixels[10, [10, 9, 6, 1]] < 255).any(-1).all()
drawn, axis = pyplot.subplots(figsize=(3, 3), layout="constrained")
axis.imshow(pixels, interpolation="nearest")
