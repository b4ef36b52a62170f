"""Small vision transformers that differ in what a patch sees, on images that ship in a package.

    python launch.py --config=configs/vit.py --sweep=patterns --workdir=runs/vit
    python launch.py --config=configs/vit.py:moving_digits --sweep=video --workdir=runs/video
    python launch.py --config=configs/vit.py:swin,fashion_mnist --workdir=runs/fashion
    python launch.py --config=configs/vit.py:maxvit --workdir=runs/maxvit

The argument is a variant (full, neighborhood, swin, axial, or any other of `models/presets.py` that
fits the grid), a data set (digits, fashion_mnist, moving_digits) and a size (small, tiny), in any
order. The runs of one data set differ in `model.pattern` and nothing else.
"""

import ml_collections
from ml_collections import config_dict

from configs import common
from sparse_attn.data import images
from sparse_attn.launch import sweep
from sparse_attn.models import presets

COMPARED = ("full", "neighborhood", "swin", "axial")  # of `sweep_patterns`

# Pixels (and frames) of a patch, patches of a window along each axis, training steps.
DATA = {
    "digits": dict(patch=2, window=2, steps=300),  # A grid of 4 x 4,
    "fashion_mnist": dict(patch=2, window=7, steps=1000),  # 14 x 14,
    "moving_digits": dict(patch=2, window=3, steps=100),  # frames x rows x columns: 4 x 6 x 6.
}
SIZES = {
    "small": dict(
        num_layers=4, num_heads=4, num_kv_heads=4, head_dim=12, embed_dim=48, mlp_dim=128
    ),
    "tiny": dict(num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, embed_dim=16, mlp_dim=32),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The run of one variant on one data set in one size."""
    variants = (*COMPARED, *(name for name in presets.PRESETS if name not in COMPARED))
    chosen = common.parse_arg(arg, variant=variants, data=tuple(DATA), size=tuple(SIZES))
    data = DATA[chosen["data"]]
    config = common.base_config()
    config.task = "images"
    config.name = chosen["variant"]
    del config.sample, config.train.eval_batches  # All test images are evaluated.

    config.data = ml_collections.ConfigDict()
    config.data.name = chosen["data"]  # of sparse_attn/data/images.py
    config.data.batch_size = 64

    config.model.update(SIZES[chosen["size"]])
    config.model.patch = data["patch"]
    config.model.tile = config_dict.placeholder(
        int
    )  # patches per tile along each axis; None = row-major
    config.model.registers = config_dict.placeholder(int)  # learned tokens in front of the patches
    config.model.pattern, config.model.registers = _pattern(chosen, config.model)

    config.optim.lr = 5e-3
    config.train.steps = data["steps"]
    config.train.eval_every = config.train.checkpoint_every = max(100, data["steps"] // 5)
    if chosen["size"] == "tiny":  # For tests: all of the machinery in seconds.
        config.train.steps = 6
        config.train.log_every = 2
        config.train.eval_every = config.train.checkpoint_every = 3
        config.optim.warmup_steps = 2
    return config


def _pattern(chosen: dict[str, str], model: ml_collections.ConfigDict) -> tuple[str, int | None]:
    """The expression of a variant on the grid of the patches, and its registers."""
    grid = tuple(n // model.patch for n in images.source(chosen["data"]).image_shape[:-1])
    schedule = presets.schedule(
        chosen["variant"],
        grid,
        window=DATA[chosen["data"]]["window"],
        num_heads=model.num_heads,
    )
    layers = schedule.patterns
    pattern = schedule if len(layers) > 1 else layers[0]
    return pattern.expression(), presets.PRESETS[chosen["variant"]].registers


def _compared(data: str) -> list[sweep.Point]:
    configs = [get_config(f"{name},{data}") for name in COMPARED]
    return sweep.product(
        sweep.fixed("data.name", data),
        sweep.zipit(
            sweep.over("name", COMPARED),
            sweep.over("model.pattern", [config.model.pattern for config in configs]),
        ),
    )


def sweep_patterns():
    """One run per compared pattern, on digits."""
    yield from _compared("digits")


def sweep_video():
    """One run per compared pattern, on moving digits."""
    yield from _compared("moving_digits")


def sweep_fashion_mnist():
    """One run per compared pattern, on clothes."""
    yield from _compared("fashion_mnist")
