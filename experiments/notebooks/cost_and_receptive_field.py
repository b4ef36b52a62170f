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
# # What a pattern costs, and what it reaches
#
# Before anything is trained: how much faster than dense attention can a pattern be, and through how
# many layers does information have to travel?

# %%
from matplotlib import pyplot

from sparse_attn import patterns, viz

# %% [markdown]
# ## Cost
#
# FLOPs and blocks are counted, not estimated. The bound of the speed-up is what a perfect kernel
# would gain; where `experiments/kernels/results` has the same mask, sizes and device, what was
# measured stands beside it. The break-even density says from where on sparse attention does not
# pay.

# %%
measured = viz.cost("local(window=512)", 8192, head_dim=64, heads=4, device="cpu")
print(measured)
assert measured.useful_flops < measured.executed_flops
if measured.measured is not None:
    assert measured.measured_speedup < measured.bound

# %%
on_h200 = viz.cost("local(window=1024)", 65536, head_dim=128, heads=16, device="h200")
print(on_h200)
assert 25 < on_h200.bound < 35

# %% [markdown]
# ## Block size
#
# Smaller blocks follow a pattern more closely, and use the hardware worse: the masked work falls,
# and so does the density up to which sparse attention pays.

# %%
for block in (16, 32, 64, 128, 256):
    found = viz.cost(
        "dilated(window=64, dilation=16)", 4096, head_dim=64, heads=1, device="h200", block=block
    )
    pays = next(b for b in found.break_even if b.block == block)
    print(
        f"block {block:3}: block density {found.block_density:.3f}, executed / useful "
        f"{found.executed_over_useful:5.2f}, pays below {pays.block_density:.3f} ({pays.source})"
    )

# %% [markdown]
# ## Patterns at equal density
#
# `{n}` is filled in so that all see the same number of keys. What they cost differs widely, and so
# does the number of layers until the last token depends on all others.

# %%
same = viz.compare(
    [
        "local(window=128)",
        "chunked(size={n})",
        "dilated(window={n}, dilation=4)",
        "local(window={n}) | sinks(tokens=16)",
        "local(window={n}) | strided(stride=32, part='column')",
    ],
    2048,
    block=64,
)
print(same)
densities = [found.token_density for found in same.costs]
assert max(densities) / min(densities) < 1.05
same.show()

# %% [markdown]
# ## Receptive field
#
# After a layer a token depends on all that the tokens which it sees depended on. A window of w
# reaches w - 1 further with every layer; a column of strides makes it two layers for everything.

# %%
window = viz.receptive_field(patterns.parse("local(window=64)"), 1024, num_layers=8)
print(window)
assert [layer.back for layer in window.layers] == [63 * n for n in range(1, 9)]

# %%
strides = patterns.parse("local(window=32) | strided(stride=32, part='column')")
assert viz.receptive_field(strides, 1024).first_full_layer == 2

# %% [markdown]
# Schedules of layers: five windows and one dense layer, as many models have it. Chunks never reach
# across their border, whatever the depth.

# %%
schedule = patterns.parse(f"per_layer(({'local(window=64), ' * 5}causal()))")
field = viz.receptive_field(schedule, 1024)
assert field.first_full_layer == 6
chunks = viz.receptive_field(patterns.parse("chunked(size=256)"), 1024)
print(chunks)
assert chunks.unreachable(1023).tolist() == list(range(768))

# %%
reach = {"local(window=64)": window, "five windows, one dense": field, "chunked(size=256)": chunks}
made, axis = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
for name, found in reach.items():
    axis.plot([x.layer for x in found.layers], [x.coverage for x in found.layers], "o-", label=name)
axis.set(xlabel="layers", ylabel="share of earlier tokens reached", ylim=(0, 1.05))
axis.legend(fontsize=8)

# %% [markdown]
# At a million tokens, sets of tokens are followed down from the last query: still exact.

# %%
far = viz.receptive_field(patterns.parse("local(window=4096) | sinks(tokens=64)"), 1 << 20)
print(far)
assert far.layers[-1].coverage < 0.05
