"""What a full device says, and what the message proposes."""

import pytest

from configs import common
from sparse_attn.train import main as main_lib
from sparse_attn.train import out_of_memory


def config(**changes):
    plain = common.base_config().to_dict()
    for name, value in changes.items():
        section, field = name.split("__")
        plain[section][field] = value
    return plain


@pytest.mark.parametrize(
    "text, full",
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes.", True),
        ("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory", True),
        ("XLA:TPU compile permanent error. Ran out of memory in memory space hbm.", True),
        ("INVALID_ARGUMENT: shapes differ", False),
    ],
)
def test_errors_are_told_apart(text, full):
    assert out_of_memory.is_out_of_memory(RuntimeError(text)) is full


def test_remedies_are_fields_that_exist_and_need_less():
    flags = out_of_memory.remedies(
        config(data__batch_size=8, optim__grad_accum=2, model__dtype="float32")
    )
    assert flags == [
        "--config.optim.grad_accum=4", "--config.model.remat=block",
        "--config.model.dtype=bfloat16", "--config.data.batch_size=4", "--config.data.context=256",
    ]  # fmt: skip
    names = {flag.removeprefix("--config.").split("=")[0] for flag in flags}
    assert names <= set(main_lib.config_check.dotted_names(common.base_config()))


def test_weights_are_split_first_where_there_are_devices_to_split_them_over():
    plain = config()
    first, *rest = out_of_memory.remedies(plain, num_devices=8)
    assert first == "--config.mesh.axes=fsdp=-1"
    plain["mesh"]["axes"] = "data=2,fsdp=4"
    assert out_of_memory.remedies(plain, num_devices=8) == rest


def test_remedies_that_are_used_up_are_left_out():
    flags = out_of_memory.remedies(
        config(data__batch_size=1, data__context=64, model__remat="block", model__dtype="bfloat16")
    )
    assert flags == ["--config.data.context=32"]


def test_the_message_is_one_line():
    error = RuntimeError("RESOURCE_EXHAUSTED: no memory.\nBuffer 1: 8 GB\nBuffer 2")
    message = out_of_memory.explain(error, config())
    assert "\n" not in message
    assert "no memory. To need less, in this order: --config.optim.grad_accum=2 " in message
