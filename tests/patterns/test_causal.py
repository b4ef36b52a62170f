from sparse_attn.masks import stats
from sparse_attn.patterns import causal


def test_picture(draw):
    assert draw(causal.Causal()) == [
        "#.......",
        "##......",
        "###.....",
        "####....",
        "#####...",
        "######..",
        "#######.",
        "########",
    ]


def test_density_is_half_and_a_bit():
    for length in (1, 7, 1000):
        assert stats.of(causal.Causal(), q_len=length).token_density == (length + 1) / (2 * length)
