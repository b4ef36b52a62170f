from sparse_attn.patterns import full


def test_everything_is_visible(draw, pairs):
    assert draw(full.Full()) == ["########"] * 8
    assert pairs(full.Full(), 100) == 100 * 100
