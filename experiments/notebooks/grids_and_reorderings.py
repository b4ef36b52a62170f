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
# # Grids and reorderings
#
# Tokens of an image or a video stand in a grid. What a query sees is easy to say on the grid, and
# it is the order of the tokens in memory that decides how many blocks this costs.

# %%
from sparse_attn import patterns, viz
from sparse_attn.masks import curves, reorder, stats
from sparse_attn.patterns import neighborhood, permuted

# %% [markdown]
# ## What one query sees
#
# A neighbourhood keeps its size at the border; a shifted window does not.

# %%
near = neighborhood.Neighborhood(shape=(12, 16), kernel_size=5)
print(viz.on_grid(near, (6, 8)))
print(viz.on_grid(near, (0, 15)))
assert "sees 25 of 192" in viz.on_grid(near, (0, 15))

# %%
for expression in (
    "swin(shape=(12, 16), window_size=4, shift=2)",
    "axial(shape=(12, 16), axes=(0,)) | axial(shape=(12, 16), axes=(1,))",
    "block_grid(shape=(12, 16), grid=4)",
    "neighborhood(shape=(12, 16), kernel_size=4, dilation=3)",
    "circular(shape=(12, 16), radius=3)",
):
    print(viz.on_grid(patterns.parse(expression), (5, 7)), end="\n\n")

# %% [markdown]
# A video: two frames back, and a spatial window in each.

# %%
video = patterns.parse(
    "neighborhood(shape=(6, 8, 8), kernel_size=(3, 5, 5), causal_axes=(True, False, False))"
)
viz.show_on_grid(video, [(4, 3, 3), (1, 0, 0)])

# %% [markdown]
# ## The order of the tokens
#
# In row-major order a block of 64 tokens is a piece of a row, and its window reaches over whole
# rows. In tiles the block is a square, and its window a few squares: most of the masked work goes.

# %%
shape = (64, 128)
near = neighborhood.Neighborhood(shape, kernel_size=32)
orders = {
    "row-major": reorder.Tiles(shape),
    "tiles 8 x 8": reorder.Tiles(shape, (8, 8)),
    "tiles 4 x 16": reorder.Tiles(shape, (4, 16)),
}
ratio = {}
for name, order in orders.items():
    counted = stats.of(
        permuted.permute(near, order), q_len=shape[0] * shape[1], block_q=64, block_kv=64
    )
    ratio[name] = counted.block_density / counted.token_density
    print(
        f"{name:14} block density {counted.block_density:.4f}, executed / useful {ratio[name]:.2f}"
    )
assert ratio["tiles 8 x 8"] < 2 < ratio["row-major"]

# %%
viz.show_order(reorder.Tiles((16, 16), (4, 4)), block=16)

# %%
viz.show_order(curves.Hilbert((16, 16)), block=16)

# %% [markdown]
# ## Tiles that are visited
#
# How much of the saving survives in a kernel that works on tiles? Generalized neighborhood
# attention [arXiv:2504.16922] lets a group of `stride` queries share a window; where windows,
# strides and tiles agree, no work is masked. This is the paper's case of a video of 30 x 48 x 80
# tokens and a window of 18 x 24 x 24, with tiles of 4 x 8 x 8 queries and 2 x 8 x 8 keys.

# %%
bounds = {}
for stride in ((1, 1, 1), (1, 1, 8), (1, 8, 8), (2, 8, 8), (16, 8, 8)):
    pattern = neighborhood.Neighborhood((30, 48, 80), (18, 24, 24), stride=stride)
    found = viz.simulate_tiles(pattern, (4, 8, 8), (2, 8, 8))
    bounds[stride] = found.bound
    print(f"stride {stride}: bound {found.bound:.1f} of {found.flop_bound:.1f} by FLOPs")
assert [round(x, 1) for x in bounds.values()] == [3.3, 5.5, 9.1, 10.0, 11.1]

# %% [markdown]
# Which tile suits a window? The masked work of the window above, queries and keys tiled alike. At
# 8 x 8 it is what the block lists of the reordered tokens gave.

# %%
for tile in ((1, 64), (2, 32), (4, 16), (8, 8)):
    found = viz.simulate_tiles(near, tile, tile)
    print(
        f"tile {tile}: executed / useful {found.executed_over_useful:.2f}, bound {found.bound:.1f}"
    )
