import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_attn.data import packing, tokenizer


def by_hand(tokens):
    """The definition, one token at a time."""
    inputs, targets = tokens[:-1], tokens[1:]
    weights, segments, positions = [], [], []
    segment, position = 1, -1
    for index, (token, target) in enumerate(zip(inputs, targets, strict=True)):
        if token == tokenizer.BOS and index > 0:
            segment, position = segment + 1, -1
        position += 1
        padding = token == tokenizer.PAD
        segments.append(0 if padding else segment)
        positions.append(0 if padding else position)
        crosses = token == tokenizer.EOS or padding
        weights.append(float(not crosses and target != tokenizer.PAD))
    return {
        "inputs": inputs,
        "targets": targets,
        "weights": weights,
        "segment_ids": segments,
        "positions": positions,
    }


@hypothesis.given(
    st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=8),
    st.integers(1, 12),
)
def test_windows_match_the_definition_and_score_every_byte_once(documents, context):
    stream = []
    for document in documents:
        stream += [tokenizer.BOS, *document, tokenizer.EOS]
    count = packing.num_windows(len(stream), context)
    padded = stream + [tokenizer.PAD] * (count * context + 1 - len(stream))
    windows = [padded[w * context : (w + 1) * context + 1] for w in range(count)]
    batch = packing.pack(np.array(windows, np.uint16))
    for name, values in batch.items():
        assert values.dtype == (np.float32 if name == "weights" else np.int32)
        assert values.tolist() == [by_hand(window)[name] for window in windows], name
    scored = batch["targets"][batch["weights"] == 1]
    assert bytes(scored[scored < 256].astype(np.uint8)) == b"".join(documents)
    assert (scored == tokenizer.EOS).sum() == len(documents)
    assert (scored == tokenizer.BOS).sum() == 0


@pytest.mark.parametrize(
    "num_tokens, context, expected", [(2, 1, 1), (2, 5, 1), (5, 4, 1), (6, 4, 2), (9, 4, 2)]
)
def test_the_last_pair_falls_into_the_last_window(num_tokens, context, expected):
    assert packing.num_windows(num_tokens, context) == expected
