"""The Makefile and .ci/run: the search for a Python, its environment, and which tests are started.

Interpreters are fake ones.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TOOLS = ("bash", "make", "env", "touch", "rm", "find", "cat", "mkdir", "chmod")

pytestmark = pytest.mark.skipif(
    shutil.which("make") is None, reason="needs the make program (Debian: apt-get install make)"
)

# Answers the Makefile's check like an interpreter of one version, and `-m venv` by making an
# environment whose python writes down how it was called.
FAKE = """#!/bin/bash
if [ "$1" = -V ]; then echo "Python {version}.9"; exit 0; fi
if [ "$1" = -c ]; then [ -z "${{3:-}}" ] || [ "$3" = {version} ]; exit; fi
if [ "$1 $2" = "-m venv" ]; then
  folder="${{@: -1}}"; mkdir -p "$folder/bin"
  printf '%s\\n' '#!/bin/bash' '[ "$1" = -V ] && echo "Python {version}.9" || echo "$@" >> calls' \
    > "$folder/bin/python"
  chmod +x "$folder/bin/python"
fi
"""
# What pyenv leaves on PATH for a version that is not selected.
BROKEN = "#!/bin/bash\necho 'pyenv: command not found' >&2\nexit 127\n"


@pytest.fixture
def tree(tmp_path):
    """A checkout with only the Makefile, an empty HOME, and a PATH of a few tools."""
    for folder in ("bin", "home", "repo"):
        (tmp_path / folder).mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    shutil.copy(ROOT / "Makefile", tmp_path / "repo")
    for name in ("requirements.txt", "requirements-dev.txt"):
        (tmp_path / "repo" / name).write_text("x\n")
    return tmp_path


def fake(path: pathlib.Path, version: str | None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(BROKEN if version is None else FAKE.format(version=version))
    path.chmod(0o755)
    return str(path)


def make(tree, *arguments):
    return subprocess.run(
        ["make", "--no-print-directory", "-C", str(tree / "repo"), *arguments],
        env={"PATH": str(tree / "bin"), "HOME": str(tree / "home")},
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_newest_wins(tree):
    fake(tree / "bin/python3.11", "3.11")
    newest = fake(tree / "bin/python3.13", "3.13")
    fake(tree / "bin/python3.12", "3.12")
    assert make(tree, "python").stdout.strip() == newest


def test_a_shim_that_does_not_start_is_skipped(tree):
    fake(tree / "bin/python3.13", None)
    fake(tree / "bin/python3", None)
    usable = fake(tree / "bin/python3.12", "3.12")
    assert make(tree, "python").stdout.strip() == usable


def test_pyenv_versions_are_found_without_being_on_path(tree):
    fake(tree / "bin/python3.13", None)
    usable = fake(tree / "home/.pyenv/versions/3.13.0/bin/python", "3.13")
    fake(tree / "bin/python3.11", "3.11")
    assert make(tree, "python").stdout.strip() == usable


def test_plain_python3_counts_by_its_real_version(tree):
    fake(tree / "bin/python3", "3.10")
    result = make(tree, "python")
    assert result.returncode != 0
    usable = fake(tree / "bin/python3", "3.11")
    assert make(tree, "python").stdout.strip() == usable


def test_no_python_is_one_clear_line(tree):
    result = make(tree, ".venv/.requirements")
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert errors == [
        "error: no usable Python 3.13, 3.12, 3.11 found (on PATH or under ~/.pyenv/versions); "
        "name one with PYTHON=/path/to/python"
    ]


def test_python_overrides(tree):
    fake(tree / "bin/python3.13", "3.13")
    assert make(tree, "python", f"PYTHON={sys.executable}").stdout.strip() == sys.executable


def test_python_that_is_unusable_is_refused(tree):
    fake(tree / "bin/python3.13", "3.13")
    broken = fake(tree / "other/python", None)
    result = make(tree, "python", f"PYTHON={broken}")
    assert result.returncode != 0
    assert f"error: PYTHON={broken} must be a Python >= 3.11" in result.stderr


def test_environment_is_made_once_and_filled_again_only_after_a_change(tree):
    fake(tree / "bin/python3.13", "3.13")
    calls = tree / "repo/calls"

    def installs():
        return [c for c in calls.read_text().splitlines() if "pip install" in c]

    result = make(tree, ".venv/.requirements-dev")
    assert result.returncode == 0, result.stderr
    assert ".venv: Python 3.13.9" in result.stdout
    assert [c.split()[-1] for c in installs()] == ["requirements.txt", "requirements-dev.txt"]
    make(tree, ".venv/.requirements-dev")
    assert len(installs()) == 2
    later = (tree / "repo/.venv/.requirements-dev").stat().st_mtime + 10
    os.utime(tree / "repo/requirements-dev.txt", (later, later))
    make(tree, ".venv/.requirements-dev")
    assert [c.split()[-1] for c in installs()][2:] == ["requirements-dev.txt"]


def test_another_python_than_that_of_the_environment_is_refused(tree):
    fake(tree / "bin/python3.13", "3.13")
    other = fake(tree / "other/python", "3.12")
    make(tree, ".venv/.requirements")
    result = make(tree, ".venv/.requirements", f"PYTHON={other}")
    assert result.returncode != 0
    assert "error: .venv was made with Python 3.13.9" in result.stderr


def test_main_lane_on_311_needs_no_second_one(tree):
    fake(tree / "bin/python3.11", "3.11")
    make(tree, ".venv/.requirements-dev")
    python = tree / "repo/.venv/bin/python"
    python.write_text("#!/bin/bash\necho '(3, 11)'\n")
    result = make(tree, "test-py311")
    assert result.returncode == 0, result.stderr
    assert "nothing to add" in result.stdout


def test_slow_tests_run_whole_or_in_part(tree):
    fake(tree / "bin/python3.13", "3.13")
    make(tree, ".venv/.requirements-dev")
    for arguments, expected in (([], "-m slow"), (["MATRIX=1/4"], "-m slow --matrix-part=1/4")):
        result = make(tree, "test-slow", *arguments)
        assert result.returncode == 0, result.stderr
        assert (tree / "repo/calls").read_text().splitlines()[-1].endswith(expected)


needs_git = pytest.mark.skipif(
    shutil.which("git") is None, reason="needs the git program (Debian: apt-get install git)"
)


@pytest.mark.parametrize("in_git", [False, pytest.param(True, marks=needs_git)])
def test_ci_chooses_the_part_by_the_commit(tree, in_git):
    repo = tree / "repo"
    (repo / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", repo / ".ci")
    (tree / "bin/make").unlink()  # Every stage succeeds at once.
    (tree / "bin/make").write_text("#!/bin/bash\n")
    (tree / "bin/make").chmod(0o755)
    (tree / "bin/dirname").symlink_to(shutil.which("dirname"))
    env = {"PATH": str(tree / "bin"), "HOME": str(tree / "home")}
    expected = 0
    if in_git:
        (tree / "bin/git").symlink_to(shutil.which("git"))
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        for command in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "x"]):
            subprocess.run(["git", *command], cwd=repo, env=env, check=True)
        head = ["git", "rev-parse", "--short=7", "HEAD"]
        commit = subprocess.run(head, cwd=repo, env=env, check=True, capture_output=True)
        expected = int(commit.stdout, 16) % 4
    result = subprocess.run([".ci/run"], cwd=repo, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"== test-slow: make test-slow MATRIX={expected}/4\n" in result.stdout
