import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_attn.data import tokenizer


@hypothesis.given(st.binary(max_size=300))
def test_any_bytes_round_trip(raw):
    tokens = tokenizer.encode(raw)
    assert tokens.dtype == np.int32
    assert len(tokens) == len(raw)
    assert tokenizer.decode(tokens) == raw


@hypothesis.given(st.text(max_size=100))
def test_any_text_round_trips(text):
    assert tokenizer.to_text(tokenizer.encode(text)) == text


def test_marks_and_unused_ids_are_no_bytes():
    ids = np.arange(tokenizer.VOCAB_SIZE)
    assert tokenizer.decode(ids) == bytes(range(256))
    assert len({tokenizer.PAD, tokenizer.BOS, tokenizer.EOS}) == 3
    assert tokenizer.VOCAB_SIZE % 128 == 0


@pytest.mark.parametrize("bad", [-1, tokenizer.VOCAB_SIZE])
def test_ids_outside_the_vocabulary_are_refused(bad):
    with pytest.raises(ValueError, match=f"contains {bad}; ids must be in 0..383"):
        tokenizer.decode(np.array([65, bad]))


def test_decoding_for_display_never_fails():
    assert tokenizer.to_text(np.array([0xC3, 0x28, 0xFF])) == "\ufffd(\ufffd"
