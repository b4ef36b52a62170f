"""Settings every test shares: CPU only, and hypothesis without deadlines or randomness."""

import os

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


@pytest.fixture
def monkeypatch(monkeypatch):
    """Programs traced before would not see what the test replaces; those with it must not stay."""
    import jax  # After the environment above is set.

    jax.clear_caches()
    yield monkeypatch
    jax.clear_caches()
