"""A model and data small enough to train in a test."""

import jax
import numpy as np

from sparse_attn.models import transformer
from sparse_attn.patterns import local
from sparse_attn.train import optim, state

VOCAB, CONTEXT, BATCH = 384, 16, 4


def model(**changes):
    fields = dict(
        vocab_size=VOCAB, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, mlp_dim=32,
        pattern=local.Local(window=6), impl="reference",
    )  # fmt: skip
    return transformer.Transformer(transformer.TransformerConfig(**(fields | changes)))


def optimizer(steps=20):
    return optim.adamw(optim.warmup_cosine(peak=1e-2, warmup_steps=2, steps=steps))


def new_state(model_, optimizer_, seed=0):
    return state.create(model_, optimizer_, key=jax.random.key(seed), length=CONTEXT)


def check_it_learns(model_, steps=12):
    """The loss of a few steps is finite, and falls."""
    optimizer_ = optimizer(steps=steps)
    step, now = state.make_train_step(model_, optimizer_), new_state(model_, optimizer_)
    losses = []
    for batch, _ in zip(Batches(), range(steps)):
        now, metrics = step(now, batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert np.mean(losses[-2:]) < losses[0] - 0.1


class Batches:
    """An endless stream whose tokens follow from the one before; resumable as the real one is."""

    def __init__(self, seed=0, bad_at=None):
        self._seed, self._bad_at, self._next = seed, bad_at, 0

    def __iter__(self):
        return self

    def __next__(self):
        rng = np.random.default_rng([self._seed, self._next])
        tokens = np.empty((BATCH, CONTEXT + 1), np.int32)
        tokens[:, 0] = rng.integers(32, 64, BATCH)
        for t in range(CONTEXT):
            tokens[:, t + 1] = 32 + (5 * tokens[:, t] + rng.integers(0, 2, BATCH)) % 32
        weights = rng.integers(0, 2, (BATCH, CONTEXT)).astype(np.float32)
        weights[0] = 1
        self._next += 1
        if self._next == self._bad_at:
            weights[0, 0] = np.nan
        return {
            "inputs": tokens[:, :-1].copy(),
            "targets": tokens[:, 1:].copy(),
            "weights": weights,
            "segment_ids": np.repeat([[1, 2]], [10, CONTEXT - 10], 1).repeat(BATCH, 0).astype("i4"),
            "positions": np.r_[:10, : CONTEXT - 10][None].repeat(BATCH, 0).astype("i4"),
        }

    def get_state(self):
        return {"next": self._next}

    def set_state(self, saved):
        self._next = saved["next"]
