import jax
import pytest

from sparse_attn import patterns
from sparse_attn.ops import attend
from sparse_attn.patterns import causal, local, per_head, retrieval_heads, sinks
from tests.patterns import on_grid

RetrievalHeads = retrieval_heads.RetrievalHeads


def test_picture(draw):
    full, streaming = RetrievalHeads((True, False), window=3, sink_tokens=1).patterns
    assert draw(full)[-1] == "########"
    assert draw(streaming) == [
        "#.......",
        "##......",
        "###.....",
        "####....",
        "#.###...",
        "#..###..",
        "#...###.",
        "#....###",
    ]


def test_all_retrieval_is_dense_and_none_is_sinks_and_window():
    assert set(RetrievalHeads((True,) * 3, window=5).patterns) == {causal.Causal()}
    streaming = local.Local(window=5) | sinks.Sinks(tokens=2)
    assert RetrievalHeads((False,) * 3, window=5, sink_tokens=2).patterns == (streaming,) * 3
    assert RetrievalHeads((False,), window=5).patterns == (local.Local(window=5),)


def test_cached_tokens_are_the_formula():
    """What the last query reads, per KV head: all, or sinks and window."""
    retrieval, length, window, first = (True, False, False, True), 50, 8, 3
    heads = RetrievalHeads(retrieval, window=window, sink_tokens=first)
    kept = [on_grid.dense(p, length)[-1].sum() for p in heads.patterns]
    assert kept == [length if full else window + first for full in retrieval]


def test_query_heads_have_the_class_of_their_kv_head():
    """A key that left the window matters to retrieval heads only."""
    heads = RetrievalHeads((False, True), window=4, sink_tokens=1, queries_per_kv=2)
    q, _ = jax.random.normal(jax.random.key(0), (2, 1, 16, 4, 8))
    k, v = jax.random.normal(jax.random.key(1), (2, 1, 16, 2, 8))

    @jax.jit
    @jax.grad
    def slope_of_the_last_output(v):
        return attend.attend(q, k, v, mask=heads, impl="reference")[:, -1].sum()

    slope = slope_of_the_last_output(v)[0]
    assert (slope[6, 0] == 0).all()
    assert (slope[6, 1] != 0).all()
    assert (slope[0] != 0).all()


def test_is_a_pattern_per_head_that_configs_can_write():
    heads = patterns.parse("retrieval_heads((True, False), window=8, sink_tokens=2)")
    assert isinstance(heads, per_head.PerHead)
    assert heads.causal
    assert heads.for_heads(4)[2] == causal.Causal()
    schedule = f"per_layer((causal(), {heads.expression()}))"
    assert patterns.parse(schedule).for_layer(1) == heads


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"retrieval": (), "window": 4}, r"retrieval=\(\) must be True or False per KV head"),
        ({"retrieval": (1, 0), "window": 4}, r"retrieval=\(1, 0\) must be True or False"),
        ({"retrieval": (True,), "window": 0}, "window=0 must be an int >= 1"),
        ({"retrieval": (False,), "window": 4, "sink_tokens": 0}, "tokens=0 must be an int >= 1"),
        ({"retrieval": (True,), "window": 4, "queries_per_kv": 0}, "queries_per_kv=0 must be"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        RetrievalHeads(**fields)
