"""What config files share: their argument, the full tree of fields with defaults, model sizes."""

import difflib

import ml_collections
from ml_collections import config_dict

# Decoders by size. Parameter counts are in tests/golden/.
SIZES = {
    "small": dict(
        num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, embed_dim=160, mlp_dim=480
    ),
    "tiny": dict(num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, embed_dim=32, mlp_dim=64),
}


def parse_arg(arg: str | None, **choices: tuple[str, ...]) -> dict[str, str]:
    """Reads the part after the colon in `--config=FILE.py:ARG`: one word per field, any order.

    Each field lists its words; the first is the default. `name=word` says which field is meant.

    Raises:
      ValueError: a word that no field lists, or two words for one field.

    >>> parse_arg("tiny", variant=("full", "local"), size=("small", "tiny"))
    {'variant': 'full', 'size': 'tiny'}
    """
    fields = {name: words[0] for name, words in choices.items()}
    given = set()
    for part in filter(None, (arg or "").split(",")):
        name, _, word = part.rpartition("=")
        owners = [n for n, words in choices.items() if word in words and name in ("", n)]
        if not owners:
            known = [w for words in choices.values() for w in words]
            near = difflib.get_close_matches(word, known, n=1)
            hint = f"; nearest: {near[0]}" if near else ""
            listed = " and ".join(f"{n} ({', '.join(words)})" for n, words in choices.items())
            raise ValueError(f"argument {part!r} must be one of: {listed}{hint}")
        if owners[0] in given:
            raise ValueError(f"argument {arg!r} must give {owners[0]} only once")
        given.add(owners[0])
        fields[owners[0]] = word
    return fields


def base_config() -> ml_collections.ConfigDict:
    """Every field a run has. `None` = off or chosen by the program; set it to override."""
    config = ml_collections.ConfigDict()
    config.name = "run"
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    config.data.path = config_dict.placeholder(str)  # text file, folder or array_record
    config.data.prepared_dir = config_dict.placeholder(str)  # a folder prepared before
    config.data.max_bytes = config_dict.placeholder(int)  # of text; None = all of it
    config.data.context = 512  # tokens per row
    config.data.batch_size = 8  # rows per step, of all processes together

    config.model = ml_collections.ConfigDict()
    config.model.pattern = "causal()"  # per_layer((a, b)) cycles through the layers
    config.model.update(SIZES["small"])
    config.model.block = config_dict.placeholder(int)  # tokens per mask block; None = automatic
    config.model.dtype = "auto"  # of the computation: bfloat16 on a GPU or TPU, float32 on CPU
    config.model.remat = "none"  # or "block", "dots"
    config.model.impl = config_dict.placeholder(str)  # backend of `attend`

    config.mesh = ml_collections.ConfigDict()
    config.mesh.axes = "data=1"  # devices along data, fsdp, seq and tensor; -1 = those left over
    config.mesh.sequence = "ring"  # scheme[:order of tokens] of the seq axis
    config.mesh.rules = config_dict.placeholder(tuple)  # (path, axes) of parameters; None = usual

    config.optim = ml_collections.ConfigDict()
    config.optim.lr = 3e-3
    config.optim.warmup_steps = 20
    config.optim.weight_decay = 0.1
    config.optim.b1 = 0.9
    config.optim.b2 = 0.95
    config.optim.clip_norm = 1.0
    config.optim.grad_accum = 1  # micro-batches per step
    config.optim.skip_spikes = config_dict.placeholder(float)  # standard deviations; None = off

    config.train = ml_collections.ConfigDict()
    config.train.steps = 1000
    config.train.log_every = 10
    config.train.eval_every = 200
    config.train.eval_batches = 16
    config.train.checkpoint_every = 200
    config.train.keep = 2  # newest checkpoints
    config.train.hang_seconds = 900.0  # without progress until the stacks are written

    config.sample = ml_collections.ConfigDict()
    config.sample.prompt = "The "
    config.sample.length = 200  # tokens
    config.sample.temperature = 0.8
    config.sample.top_k = 40
    return config


def short_run(
    config: ml_collections.ConfigDict, size: str, *, tiny_steps: int
) -> ml_collections.ConfigDict:
    """Makes `config` a run of minutes on two CPU cores; "tiny" all of its machinery in seconds."""
    config.model.update(SIZES[size])
    config.data.batch_size = 4
    config.train.steps = 160
    config.train.eval_every = 40
    config.train.checkpoint_every = 80
    if size == "tiny":
        config.data.context = 128
        config.data.max_bytes = 200_000
        config.train.steps = tiny_steps
        config.train.log_every = 2
        config.train.eval_every = tiny_steps // 2
        config.train.eval_batches = 2
        config.train.checkpoint_every = tiny_steps // 2
        config.sample.length = 16
        config.optim.warmup_steps = 2
    return config
