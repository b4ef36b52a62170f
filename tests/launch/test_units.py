import os
import shlex
import subprocess
import sys

import ml_collections
import pytest
from absl import flags
from ml_collections import config_dict, config_flags

from sparse_attn.launch import sweep, units

CONFIG_FILE = """
import ml_collections
from ml_collections import config_dict

def get_config(arg=None):
    config = ml_collections.ConfigDict()
    config.name = arg or "run"
    config.seed = 0
    config.optim = ml_collections.ConfigDict({"lr": 1e-3, "nesterov": False})
    config.model = ml_collections.ConfigDict({"pattern": "causal()", "sizes": (1, 2)})
    config.model.window = config_dict.placeholder(int)
    return config

def sweep_seeds():
    for seed in range(3):
        yield {"seed": seed, "name": f"seed {seed}"}
"""


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG_FILE)
    return str(path)


def make_config() -> ml_collections.ConfigDict:
    namespace = {}
    exec(CONFIG_FILE, namespace)
    return namespace["get_config"]()


def expand(points, **kwargs):
    return units.expand(make_config(), points, config_spec="c.py", workdir="w", **kwargs)


def test_ids_are_index_and_digest_and_folders_follow():
    a, b = expand([{}, {"seed": 1}])
    assert a.id.startswith("000-")
    assert b.id.startswith("001-")
    assert a.id[4:] != b.id[4:]
    assert b.folder == os.path.join("w", b.id)


def test_ids_are_stable_across_processes(config_path):
    program = """if True:
        import sys
        from sparse_attn.launch import units
        from sparse_attn.train import config_check
        path = sys.argv[1]
        points = units.points_of(path, "seeds")
        work = units.expand(config_check.load(path), points, config_spec=path, workdir="w")
        print(*(unit.id for unit in work))
    """
    runs = [
        subprocess.run(
            [sys.executable, "-c", program, config_path],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert len(runs[0].split()) == 3


def test_id_depends_on_the_resolved_config_only():
    (plain,) = expand([{}])
    (same,) = expand([{"seed": 0}])
    (by_command_line,) = expand([{}], given={"optim.lr": 3e-4})
    (by_sweep,) = expand([{"optim.lr": 3e-4}])
    assert plain.id == same.id
    assert by_command_line.id == by_sweep.id != plain.id


def test_the_given_config_is_left_alone():
    config = make_config()
    units.expand(config, [{"seed": 5}], config_spec="c.py", workdir="w")
    assert config.seed == 0


@pytest.mark.parametrize(
    ("points", "given", "message"),
    [
        ([{"optim.rl": 1e-3}], {}, r"config.optim.rl is unknown.*config.optim.lr"),
        ([{"optim": {"lr": 1}}], {}, "config.optim is a section; set one of: optim.lr"),
        ([{"seed": "a"}], {}, "config.seed='a' must be of type int"),
        ([{"optim.lr": None}], {}, "config.optim.lr=None must be its default"),
        ([{"seed": 1}], {"seed": 2}, "--config.seed is set by the sweep itself"),
        ([{"seed": 1}, {}, {"seed": 1}], {}, "units 0 and 2 of the sweep are the same run"),
        ([], {}, "the sweep is empty"),
    ],
)
def test_mistakes_are_named(points, given, message):
    with pytest.raises(ValueError, match=message):
        expand(points, given=given)


def test_names():
    named, by_keys, plain = expand([{"name": "a", "seed": 1}, {"seed": 2, "optim.lr": 1.0}, {}])
    assert named.name == "a"
    assert by_keys.name == "seed=2, optim.lr=1.0"
    assert plain.name == "run"


def test_points_of(config_path):
    assert units.points_of(config_path, None) == [{}]
    assert [p["seed"] for p in units.points_of(config_path, "seeds")] == [0, 1, 2]
    with pytest.raises(ValueError, match="--sweep=seed must be one of: seeds"):
        units.points_of(config_path, "seed")


def test_command_line_gives_back_the_same_config(config_path):
    """The command of a unit, parsed as the trainer parses it, is the config the id stands for."""
    overrides = {
        "name": 'it\'s a "name"; $HOME',
        "seed": 7,
        "optim.lr": 1e-07,
        "optim.nesterov": True,
        "model.pattern": "local(window=64) | sinks(tokens=4)",
        "model.sizes": (3, 4, 5),
        "model.window": 12,
    }
    config = make_config()
    (unit,) = units.expand(config, [overrides], config_spec=config_path, workdir="w")
    argv = shlex.split(shlex.join(unit.command()))[2:]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    assert values(argv) == [units.MODULE]
    assert units.digest_of(values.config) == unit.id[4:]
    assert values.workdir == unit.folder


def test_a_field_left_unset_is_not_repeated():
    (unit,) = expand([{"model.window": None}])
    assert not any("model.window" in word for word in unit.command())


def test_an_int_for_a_float_is_the_same_run():
    assert expand([{"optim.lr": 1}])[0].id == expand([{"optim.lr": 1.0}])[0].id


def test_digest_sees_every_field():
    config = make_config()
    before = units.digest_of(config)
    config.model.window = config_dict.placeholder(int)
    assert units.digest_of(config) == before
    config.model.window = 3
    assert units.digest_of(config) != before


def test_sweep_values_may_be_any_iterable():
    assert len(expand(sweep.product(sweep.over("seed", range(4)), sweep.fixed("name", "x")))) == 4
