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
# # Inspecting a run
#
# A run folder has all that is needed to open a trained model anywhere: the resolved config and
# checkpoints that know nothing of the devices they were written on. Here a tiny model is trained
# first; put the folder of a run of yours in `RUN` to look at that one.

# %%
import os
import pathlib
import random
import tempfile

from configs import quickstart
from sparse_attn import patterns, viz
from sparse_attn.train import main

RUN = None

# %% [markdown]
# ## A tiny run
#
# A few steps on text in which every sentence repeats, from the tiny size of the quickstart. One
# head sees everything before it, the other a window.

# %%
if RUN is None:
    folder = pathlib.Path(tempfile.mkdtemp())
    words = [
        "few",
        "heads",
        "look",
        "far",
        "and",
        "most",
        "of",
        "them",
        "see",
        "what",
        "is",
        "near",
    ]
    for i in range(12):
        draw = random.Random(i)
        sentence = " ".join(draw.choices(words, k=8))
        (folder / f"{i}.txt").write_text(". ".join([sentence] * 60))
    os.environ.setdefault("SPARSE_ATTN_CACHE", str(folder / "cache"))
    config = quickstart.get_config("local,tiny")
    config.data.path = str(folder)
    config.data.context = 64
    config.model.pattern = "per_head((causal(), local(window=16)))"
    config.model.block = 16
    config.model.impl = "reference"  # compiles fastest
    config.train.steps = config.train.log_every = config.train.eval_every = 6
    config.train.checkpoint_every, config.train.eval_batches = 6, 1
    config.sample.length = 4
    RUN = folder / "run"
    assert main.train(config, RUN) == 0

# %% [markdown]
# ## Opening it

# %%
run = viz.load_for_inspection(RUN)
print(f"step {run.step}, {run.model.config.pattern.expression()}, trained on {run.config['data']}")

# %% [markdown]
# ## Where the heads look
#
# The model runs once on a text; queries and keys are kept, and attention is computed from them for
# a head at a time. The table sums the mass of a head by blocks: how many blocks its pattern makes
# active, and how many hold 90 % of what it looks at.

# %%
text = "most of them see what is near and few look far. " * 4
attention = run.attend_to(text)
print(attention.table(block=8))
mass = attention.block_mass(0, 0, block=8)
assert abs(mass.sum(1) - 1).max() < 1e-5

# %%
attention.show(1, block=8)

# %% [markdown]
# ## Against a pattern
#
# How much of what a dense head looks at would a window keep? And where would the head with a window
# look, if it could?

# %%
shares = {
    size: attention.share(1, 0, patterns.parse(f"local(window={size})")) for size in (4, 16, 64)
}
print({size: round(share, 3) for size, share in shares.items()})
assert shares[4] < shares[16] < shares[64] <= 1 + 1e-6

# %%
outside = attention.block_mass(1, 1, block=8, pattern=patterns.Causal())
print(f"mass that head 1 of layer 1 would put on the first block: {outside[4:, 0].mean():.3f}")
assert attention.block_mass(1, 1, block=8)[4:, 0].max() == 0
