# make quickstart | test | test-slow | lint | test-py311 | python | clean
#   PYTHON=/path/to/python   the interpreter that makes .venv, instead of the newest one found
#   WORKERS=2                pytest processes
#   MATRIX=0/4               test-slow: of the slow tests with parameters only this part (0/4 .. 3/4)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := quickstart
.PHONY: quickstart test test-slow test-py311 lint python clean python-agrees
.DELETE_ON_ERROR:

VENV := .venv
VENV311 := .venv311
WORKERS ?= 2
MATRIX ?=
PYTHON ?=
PYTEST_ARGS ?=
PYTEST := -m pytest -n $(WORKERS) --dist worksteal -q --durations=10 $(PYTEST_ARGS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Most of the tests' time goes into compiling, so all lanes compile with few of LLVM's optimizations.
# What users start runs as theirs: the sweep of test_launch.py drops these flags.
FAST_COMPILE := JAX_PLATFORMS=cpu \
  XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true \
  --xla_cpu_emitter_verification_level=0"

# A pyenv shim exists for versions that do not start, and Debian ships Pythons without venv: an
# interpreter counts only if it runs and can make an environment that reaches a package registry.
USABLE := import sys, ssl, venv, ensurepip; v = "%d.%d" % sys.version_info[:2]
find-python = find_python() { \
  local version candidate; \
  if [ -n "$(PYTHON)" ]; then \
    "$(PYTHON)" -c '$(USABLE); sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { command -v "$(PYTHON)"; return 0; }; \
    echo "error: PYTHON=$(PYTHON) must be a Python >= 3.11 that starts and has venv and ssl" >&2; \
    return 1; \
  fi; \
  for version in $(1); do \
    for candidate in $$(type -aP "python$$version") \
        "$$HOME"/.pyenv/versions/"$$version".*/bin/python "$$HOME"/.pyenv/versions/"$$version"/bin/python \
        $$(type -aP python3); do \
      "$$candidate" -c '$(USABLE); sys.exit(v != sys.argv[1])' "$$version" >/dev/null 2>&1 \
        && { echo "$$candidate"; return 0; }; \
    done; \
  done; \
  echo "error: no usable Python $(subst $(space),$(comma) ,$(strip $(1))) found" \
    "(on PATH or under ~/.pyenv/versions); name one with PYTHON=/path/to/python" >&2; \
  return 1; \
}
comma := ,
space := $(subst ,, )

quickstart: $(VENV)/.requirements
	$(VENV)/bin/python launch.py --config=configs/quickstart.py --sweep=patterns --engine=local \
	  --workdir=runs/quickstart

test: $(VENV)/.requirements-dev
	$(FAST_COMPILE) $(VENV)/bin/python $(PYTEST) -m "not slow"

test-slow: $(VENV)/.requirements-dev
	$(FAST_COMPILE) $(VENV)/bin/python $(PYTEST) -m slow $(if $(MATRIX),--matrix-part=$(MATRIX))

lint: $(VENV)/.requirements-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

# The oldest supported Python stops at jax 0.10.x. What differs there is the syntax and the API of
# jax, not the mathematics: every file is compiled, the examples in docstrings run, and so do the
# fast tests of what reaches deepest into jax: kernels, one layer, training (whose golden run is of a
# whole model), checkpoints, and the program's command line. Left out is what calls the same API
# once more: examples that compile whole operations (their modules are imported), the plain backends'
# cases but for a few, and Triton, whose own compiler is the same on both.
ON_PY311 := sparse_attn $(addprefix tests/,launch/test_launch.py models/test_attention.py \
  ops/test_contract.py train/test_checkpoint.py train/test_golden.py)
NOT_ON_PY311 := sparse_attn.ops. or sparse_attn.selection. or triton_gpu or contract[reference \
  or (contract[xla and not (everything or per_head or bits))
test-py311: $(VENV)/.requirements-dev
	if [ "$$($(VENV)/bin/python -c 'import sys; print(sys.version_info[:2])')" = "(3, 11)" ]; then \
	  echo "test-py311: 'make test' already runs on Python 3.11, nothing to add"; \
	else \
	  $(MAKE) --no-print-directory $(VENV311)/.requirements-dev PYTHON=; \
	  $(VENV311)/bin/python -m compileall -q sparse_attn configs experiments tests launch.py; \
	  $(FAST_COMPILE) HYPOTHESIS_PROFILE=quick $(VENV311)/bin/python $(PYTEST) -m "not slow" \
	    -k "not ($(NOT_ON_PY311))" $(ON_PY311); \
	fi

python:
	@$(call find-python,3.13 3.12 3.11); find_python

clean:
	rm -rf $(VENV) $(VENV311) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed again only when a requirements file changed.
$(VENV)/.requirements: requirements.txt | python-agrees
	$(call find-python,3.13 3.12 3.11); \
	$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || \
	  { p="$$(find_python)"; echo "$(VENV): $$($$p -V) ($$p)"; "$$p" -m venv --clear $(VENV); }
	$(VENV)/bin/python -m pip install -q -r requirements.txt
	touch $@

$(VENV)/.requirements-dev: requirements-dev.txt $(VENV)/.requirements
	$(VENV)/bin/python -m pip install -q -r requirements-dev.txt
	touch $@

$(VENV311)/.requirements-dev: requirements.txt requirements-dev.txt
	$(call find-python,3.11); \
	$(VENV311)/bin/python -m pip --version >/dev/null 2>&1 || \
	  { p="$$(find_python)"; echo "$(VENV311): $$($$p -V) ($$p)"; "$$p" -m venv --clear $(VENV311); }
	$(VENV311)/bin/python -m pip install -q -r requirements-dev.txt
	touch $@

# PYTHON= chooses the interpreter only when .venv is made; never ignore it silently afterwards.
python-agrees:
	@if [ -n "$(PYTHON)" ] && [ -x $(VENV)/bin/python ]; then \
	  made="$$($(VENV)/bin/python -V)"; asked="$$("$(PYTHON)" -V)"; \
	  [ "$$made" = "$$asked" ] || { echo "error: $(VENV) was made with $$made, PYTHON=$(PYTHON)" \
	    "is $$asked; run 'make clean' first" >&2; exit 1; }; \
	fi
