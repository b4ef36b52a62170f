"""Decoders of four sizes on long rows of text, trained for equal compute whatever the attention.

The argument, words in any order: a size; what is visible (`window`: 1024 tokens and 64 sinks
[arXiv:2309.17453]; `dense`; `alternating`: a window layer, then a dense one [arXiv:2408.00118]);
and what the patterns of a size have in common, `flops` or `tokens`. The budget of N parameters is
20 N tokens [arXiv:2203.15556, table 3], or the 120 N^2 FLOPs that these take without attention.
With `flops` attention is paid from it too, by visible pairs: the sparser, the more tokens. Learning
rates are those of [arXiv:2005.14165, table 2.1].

What each size is made for, and a command on each of its hosts:

    python launch.py --config=configs/lm.py:10m,window --config.data.path=TEXT --workdir=runs/10m
    python launch.py --config=configs/lm.py:125m,window --config.data.path=TEXT --workdir=runs/125m
    python launch.py --config=configs/lm.py:350m,window --config.data.path=TEXT --workdir=runs/350m
    python launch.py --config=configs/lm.py:1.3b,window --config.data.path=TEXT --workdir=runs/1.3b

where TEXT is a file or a folder of text that every host can read (without `--config.data.path` it
is what the host has installed, see `data/corpus.py`), and with SPARSE_ATTN_HOSTS=auto where there
are several. Before, on any machine, the same with
`--dry-run --topology=...` from this table in place of `--workdir=...`:

| size | rows x tokens | topology | mesh | memory a device, window | dense |
| --- | --- | --- | --- | --- | --- |
| 10m | 16 x 8192 | v5e:2x2 | data=-1 | 5.3 GiB | 5.3 GiB |
| 125m | 16 x 32768 | v5e:4x4 | data=-1 | 5.3 GiB | 5.2 GiB |
| 350m | 16 x 32768 | v6e:4x4 | fsdp=-1 | 20.3 GiB | 20.3 GiB |
| 1.3b | 64 x 32768 | v5e:16x16 | fsdp=-1,seq=4 | 2.7 GiB | 2.8 GiB |

Memory as the TPU compiler plans it, recorded in experiments/dry_run/.
"""

import ml_collections

from configs import common
from sparse_attn.data import tokenizer
from sparse_attn.launch import sweep
from sparse_attn.models import sizes
from sparse_attn.train import flops, tasks

_WINDOW = "local(window=1024) | sinks(tokens=64)"
PATTERNS = {
    "window": _WINDOW,
    "dense": "causal()",
    "alternating": f"per_layer(({_WINDOW}, causal()))",
}
# Of each size: where it is meant to run, and what fits there.
RUNS = {
    "10m": dict(topology="v5e:2x2", axes="data=-1", context=8192, rows=16, remat="none", lr=2e-3),
    "125m": dict(
        topology="v5e:4x4", axes="data=-1", context=32768, rows=16, remat="block", lr=6e-4
    ),
    "350m": dict(topology="v6e:4x4", axes="fsdp=-1", context=32768, rows=16, remat="dots", lr=3e-4),
    "1.3b": dict(
        topology="v5e:16x16", axes="fsdp=-1,seq=4", context=32768, rows=64, remat="block", lr=2e-4
    ),
}
TOKENS_PER_PARAMETER = 20


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The run of one size, pattern and budget."""
    chosen = common.parse_arg(
        arg, size=("125m", "10m", "350m", "1.3b"), variant=tuple(PATTERNS),
        budget=("flops", "tokens"),
    )  # fmt: skip
    size, variant = chosen["size"], chosen["variant"]
    run = RUNS[size]
    config = common.base_config()
    config.name = f"{size}_{variant}"
    config.model.update(sizes.decoder(size))
    config.model.pattern = PATTERNS[variant]
    config.model.dtype = "bfloat16"
    config.model.remat = run["remat"]
    config.mesh.axes = run["axes"]
    # Where tokens are spread: a causal triangle in equal parts; a window is even as it is.
    config.mesh.sequence = "ring" if variant == "window" else "ring:zigzag"
    config.data.context = run["context"]
    config.data.batch_size = run["rows"]
    config.optim.lr = run["lr"]
    config.train.steps = steps(config, budget=chosen["budget"])
    config.optim.warmup_steps = config.train.steps // 20
    config.train.eval_every = config.train.checkpoint_every = max(1, config.train.steps // 40)
    return config


def steps(config: ml_collections.ConfigDict, *, budget: str) -> int:
    """Steps that the budget of the model allows, at least one."""
    model = tasks.build_model(config.model.to_dict(), vocab_size=tokenizer.VOCAB_SIZE).config
    heads = 2 * model.num_heads + 2 * model.num_kv_heads
    layer = model.embed_dim * (heads * model.head_dim + 3 * model.mlp_dim)
    weights = model.num_layers * layer + model.vocab_size * model.embed_dim
    tokens = config.data.context * config.data.batch_size
    if budget == "tokens":
        return max(1, round(TOKENS_PER_PARAMETER * weights / tokens))
    cost = flops.attention_cost(
        model, context=config.data.context, batch_size=config.data.batch_size
    )
    spent = 6 * weights * tokens + cost["useful_flops"]
    return max(1, round(6 * TOKENS_PER_PARAMETER * weights**2 / spent))


def sweep_patterns():
    """One run per pattern, for as many steps as the config has: equal tokens."""
    yield from sweep.zipit(
        sweep.over("name", PATTERNS), sweep.over("model.pattern", PATTERNS.values())
    )
