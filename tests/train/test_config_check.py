"""Mistakes in names are found, and the suggestion is the one a person would make."""

import pytest

from configs import quickstart
from sparse_attn.train import config_check

CONFIG = quickstart.get_config().to_dict()


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("optim.learning_rate", "optim."),
        ("optim.lrr", "optim.lr"),
        ("lr", "optim.lr"),
        ("optim.steps", "train.steps"),
        ("train.batchsize", "data.batch_size"),
        ("model.n_layers", "model.num_layers"),
        ("modle.pattern", "model.pattern"),
        ("sead", "seed"),
    ],
)
def test_nearest(wrong, right):
    with pytest.raises(ValueError, match=rf"config\.{wrong} is unknown; .* config\.{right}"):
        config_check.check_names(CONFIG, [wrong])


def test_every_name_of_a_config_is_accepted():
    config_check.check_names(CONFIG, config_check.dotted_names(CONFIG))


def test_a_section_is_not_a_value():
    with pytest.raises(ValueError, match=r"config.optim is a section; set one of: .*optim.lr"):
        config_check.check_names(CONFIG, ["optim"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--config=FILE.py.* is missing"),
        (["--config=no.py"], "there is no file 'no.py'"),
        (["--config=configs/quickstart.py:xyz"], "xyz"),
        (["--config", "configs/quickstart.py", "--config.modl.pattern=x"], "config.modl.pattern"),
        (["--config=configs/quickstart.py", "--config.optim.lrr", "3"], "config.optim.lrr"),
    ],
)
def test_command_lines(arguments, message):
    with pytest.raises(ValueError, match=message):
        config_check.check_command_line(["main.py", *arguments])


def test_a_right_command_line_passes():
    config_check.check_command_line(
        ["main.py", "--config=configs/quickstart.py:local", "--config.optim.lr=1e-3", "--workdir=x"]
    )
