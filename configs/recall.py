"""One layer of attention behind a short convolution, on tasks of recall; what can it see?

    python launch.py --config=configs/recall.py --sweep=methods --workdir=runs/recall
    python launch.py --config=configs/recall.py --sweep=small --workdir=runs/recall_small
    python launch.py --config=configs/recall.py:window8,tiny --config.data.task="mqar" --workdir=...

The argument is a method, a task and a size (small, tiny), in any order. `python -m
experiments.recall.sweep_report WORKDIR` makes the tables and pictures of a sweep. Runs of a sweep
differ in what is visible, the task, the learning rate and the seed, and in nothing else.

The convolution (3 tokens) puts what stood before a token into its key, so that one layer can
recall, as the models of [arXiv:2312.04927, app. E] and [arXiv:2402.18668] do; there are no
positions besides.
"""

import ml_collections

from configs import common
from sparse_attn.launch import sweep

LENGTH = 48
METHODS = {
    "full": "causal()",
    "window8": "local(window=8)",
    "window16": "local(window=16)",
    "sinks": "local(window=8) | sinks(tokens=4)",
    "dilated": "local(window=4) | dilated(window=8, dilation=4)",
    "bigbird": "causal() & (local(window=8) | global_tokens(tokens=4) "
    "| random_blocks(block=4, num_blocks=1, seed=0))",
    "moba": "moba(block_kv=4, top_k=3)",
    "pooled": "pooled(block_q=4, block_kv=4, top_k=3)",
    "nsa": "nsa(block_kv=4, top_k=3, initial=0, local=1, window=4, compress_block=4, stride=4)",
}
TASKS = {
    "mqar": f"mqar(vocab_size=256, length={LENGTH}, num_pairs=6, filler='zero')",
    "induction": f"induction(vocab_size=16, length={LENGTH})",
    "in_context_recall": f"in_context_recall(vocab_size=16, length={LENGTH - 1})",
    "joint_recall": "joint_recall(contexts=(2, 2), keys=(4, 4), num_values=8, vocab_size=32)",
    "selective_copy": f"selective_copy(vocab_size=16, length={LENGTH}, num_tokens=8)",
    "needle": f"needle(vocab_size=96, length={LENGTH}, distractors=5)",
    "variable_tracking": f"variable_tracking(vocab_size=64, length={LENGTH}, hops=1)",
    "group_words": "group_words(group='A5', length=24)",  # No pattern does it: the control.
}
SEEDS, RATES = range(3), (5e-3, 1e-2, 2e-2)
# The small sweep: what differs most, half an hour of one core.
SMALL_METHODS = ("full", "window8", "sinks", "moba")
SMALL_TASKS = ("mqar", "induction", "in_context_recall", "joint_recall")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The run of one method on one task."""
    chosen = common.parse_arg(arg, method=tuple(METHODS), task=tuple(TASKS), size=("small", "tiny"))
    config = common.base_config()
    config.task = "synthetic"
    config.name = f"{chosen['method']}, {chosen['task']}"
    del config.sample

    config.data = ml_collections.ConfigDict()
    config.data.task = TASKS[chosen["task"]]  # of sparse_attn/data/synthetic/
    config.data.batch_size = 64

    config.model.update(num_layers=1, num_heads=1, num_kv_heads=1, head_dim=32)
    config.model.update(embed_dim=32, mlp_dim=64, block=4, rope_base=None, short_conv=3)
    config.model.pattern = METHODS[chosen["method"]]
    config.model.dtype = "float32"

    config.optim.lr = 1e-2
    config.optim.weight_decay = 0.0
    config.train.steps = 300
    config.train.log_every = config.train.checkpoint_every = 300
    config.train.eval_every = 50
    config.train.eval_batches = 8
    if chosen["size"] == "tiny":  # For tests: the least that tells full attention from a window.
        config.data.task = "mqar(vocab_size=256, length=64, num_pairs=8, filler='zero')"
        config.train.steps = config.train.eval_every = config.train.checkpoint_every = 200
        config.optim.warmup_steps = 10
    return config


def _points(methods, tasks, rates):
    # The first rate comes first everywhere: a sweep that is stopped there is whole.
    yield from sweep.product(
        sweep.over("optim.lr", rates),
        [
            {"name": f"{m}, {t}", "model.pattern": METHODS[m], "data.task": TASKS[t]}
            for t in tasks
            for m in methods
        ],
        sweep.over("seed", SEEDS),
    )


def sweep_methods():
    """All methods, tasks, rates and seeds: 648 runs."""
    yield from _points(METHODS, TASKS, RATES)


def sweep_small():
    """Four methods on four tasks, two rates, three seeds: 96 runs."""
    yield from _points(SMALL_METHODS, SMALL_TASKS, RATES[1:])
