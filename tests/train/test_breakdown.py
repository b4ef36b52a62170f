"""Bits per byte by part: against counts made by hand, and against the evaluation as a whole."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_attn.data import packing, tokenizer
from sparse_attn.train import breakdown, evaluate
from tests.train import tiny


def test_repeats_are_runs_seen_before_in_the_document():
    row = np.array([[1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3, 4]])
    inputs, targets = row[:, :-1], row[:, 1:]
    one = np.ones_like(inputs)

    def at(segments, n):
        return np.flatnonzero(breakdown.repeated(inputs, targets, segments, n=n)[0]).tolist()

    # Target t is token t + 1; the runs "1 2 3" and, at the end, "2 3 4" and "1 2 3 4" come again.
    assert at(one, 2) == [4, 5, 8, 9, 10]
    assert at(one, 3) == [5, 9, 10]
    assert at(one, 4) == [10]
    # In two documents, the second has seen only its own: "1 2", "2 3" and "1 2 3".
    two = np.array([[1] * 4 + [2] * 7])
    assert at(two, 3) == [9]
    with pytest.raises(ValueError, match="n=1 must be at least 2"):
        at(one, 1)


class Fixed:
    """Token 65 costs one bit and everything else two, whatever came before."""

    def apply(self, variables, inputs, segment_ids=None, positions=None):
        rest = tokenizer.VOCAB_SIZE - 1
        logits = np.full(tokenizer.VOCAB_SIZE, math.log(0.5 / rest))
        logits[65] = math.log(0.5)
        return jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (*inputs.shape, len(logits)))


def test_parts_are_counted_right():
    bos, eos = tokenizer.BOS, tokenizer.EOS
    stream = [bos, 65, 66, 65, 66, eos, bos, 66, 65]
    batch = packing.pack(np.array([stream], np.uint16))
    parts = breakdown.breakdown(Fixed(), {}, [batch], edges=(0, 2), n=2)
    other = 1 + math.log2(tokenizer.VOCAB_SIZE - 1)
    # Bytes: 65 66 65 66 | 66 65; the end of the first document costs `other` and is no byte.
    assert parts["all"] == {
        "bytes": 6.0, "bits_per_byte": pytest.approx((3 + 4 * other) / 6, rel=1e-5),
    }  # fmt: skip
    # Behind 0 or 1 tokens of the document: 65 66, and 66 65 of the second.
    assert parts["position 0-1"]["bytes"] == 4
    assert parts["position 0-1"]["bits_per_byte"] == pytest.approx((2 + 2 * other) / 4, rel=1e-5)
    assert parts["position 2-"]["bytes"] == 2
    # Only "65 66" comes again in its document.
    assert parts["repeated 2-grams"] == {"bytes": 1.0, "bits_per_byte": pytest.approx(other)}
    assert parts["new"]["bytes"] == 5


def test_all_is_the_evaluation_and_parts_add_up():
    model = tiny.model()
    params = tiny.new_state(model, tiny.optimizer()).params
    stream = tiny.Batches()
    batches = [next(stream) for _ in range(2)]
    parts = breakdown.breakdown(model, params, batches, edges=(0, 4, 8), n=2)
    whole = evaluate.evaluate(evaluate.make_eval_step(model), params, map(jax.device_put, batches))
    assert parts["all"]["bits_per_byte"] == pytest.approx(whole["bits_per_byte"], rel=1e-5)
    for names in (["position 0-3", "position 4-7", "position 8-"], ["repeated 2-grams", "new"]):
        for power in (0, 1):
            total = sum(parts[n]["bytes"] * parts[n]["bits_per_byte"] ** power for n in names)
            assert total == pytest.approx(
                parts["all"]["bytes"] * parts["all"]["bits_per_byte"] ** power, rel=1e-6
            )
    with pytest.raises(ValueError, match=r"edges=\(1, 2\) must ascend from 0"):
        breakdown.breakdown(model, params, batches, edges=(1, 2))
