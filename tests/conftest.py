"""Settings every test shares: CPU only, hypothesis without deadlines, a part of the slow cells."""

import argparse
import os
import zlib

import hypothesis
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Read when a kernel is defined, so it must be known before any test is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

_WITHOUT_SHRINKING = (
    hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate,
)  # fmt: skip

# The draws are the same in every run; a test that needs more of them than these says so itself.
hypothesis.settings.register_profile("default", derandomize=True, deadline=None, max_examples=30)
# For the second Python version: the same properties, fewer draws, no search for the smallest case.
hypothesis.settings.register_profile(
    "quick", derandomize=True, deadline=None, max_examples=5, phases=_WITHOUT_SHRINKING
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def _part(text: str) -> tuple[int, int]:
    try:
        part, parts = map(int, text.split("/"))
    except ValueError:
        part = parts = 0
    if not 0 <= part < parts:
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with 0 <= K < N, such as 0/4")
    return part, parts


def pytest_addoption(parser):
    parser.addoption(
        "--matrix-part", type=_part, metavar="K/N",
        help="of the slow tests with parameters run only part K of N; all others run as ever",
    )  # fmt: skip


def pytest_collection_modifyitems(config, items):
    """A slow test's parameters are cells of a matrix: one backend, generation, mesh ... each.

    The name of a cell decides its part, so adding tests moves no other cell to another part.
    """
    if config.option.matrix_part is None:
        return
    part, parts = config.option.matrix_part

    def elsewhere(item):
        is_cell = hasattr(item, "callspec") and item.get_closest_marker("slow")
        return is_cell and zlib.crc32(item.nodeid.encode()) % parts != part

    config.hook.pytest_deselected(items=[item for item in items if elsewhere(item)])
    items[:] = [item for item in items if not elsewhere(item)]


# Folders whose tests replace nothing that programs are traced from.
_UNTRACED = ("data", "launch", "train")


@pytest.fixture
def monkeypatch(request, monkeypatch):
    """Programs traced before would not see what the test replaces; those with it must not stay."""
    if request.path.parent.name in _UNTRACED:
        yield monkeypatch
        return
    import jax  # After the environment above is set.

    jax.clear_caches()
    yield monkeypatch
    jax.clear_caches()
