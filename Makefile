# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# torch comes first and pinned: a later `pip install` then finds it and pulls nothing else.  Where a CPU wheel of this
# version is at hand (pip's find-links, a CPU index in pip.conf or PIP_EXTRA_INDEX_URL) pip prefers it; a GPU machine
# gets the registry's CUDA build.  Another build: `make setup TORCH=torch==2.6.0`.
TORCH ?= torch==2.13.0

.PHONY: setup demo test test-fast lint docs bench bench-common bench-quality bench-step bench-scale bench-cost bench-bodies bench-explore browser dist dist-check licences clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo '$(PYTHON) is too old: Python 3.11 or newer is needed, e.g. make demo PYTHON=python3.12' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: setup
	$(BIN)/opustomo demo -o demo

test: setup lint | browser
	$(BIN)/python -m pytest

# for the tests of the page of `explore`, which are skipped without it
browser:
	@command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || { apt-get -qq update && \
	  DEBIAN_FRONTEND=noninteractive apt-get -qqy install chromium chromium-driver; } >/dev/null 2>&1 || true

test-fast: setup
	$(BIN)/python -m pytest -m "not slow"

lint: setup
	$(BIN)/ruff check src tests benchmarks tools
	$(BIN)/ruff format --check src tests benchmarks tools
	$(BIN)/mypy
	$(BIN)/codespell src tests benchmarks tools runs docs .github README.md CONTRIBUTING.md CHANGELOG.md

docs: setup
	$(BIN)/python tools/write_cli.py
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

bench: setup
	$(BIN)/python benchmarks/costs.py -o scale --markdown docs/benchmarks.md

bench-common: setup
	$(BIN)/python benchmarks/run.py

bench-step: setup
	$(BIN)/python benchmarks/step.py

bench-quality: setup
	$(BIN)/python benchmarks/run.py --sets all --markdown docs/benchmarks.md

bench-scale: setup
	$(BIN)/python benchmarks/scale.py -o scale --markdown docs/scaling.md

bench-bodies: setup
	$(BIN)/python benchmarks/bodies.py -o bench/bodies --markdown docs/benchmarks.md

bench-explore: setup
	$(BIN)/python benchmarks/explore.py --markdown docs/benchmarks.md

bench-cost: setup
	$(BIN)/python benchmarks/cost.py --markdown docs/scaling.md

# wheel and sdist, the wheel from the sdist
dist: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# both installed into fresh environments, without extras and with each; others: PYTHONS="python3.12 python3.13"
PYTHONS ?= $(PYTHON)
dist-check: dist
	$(BIN)/python tools/dist_check.py dist --python $(PYTHONS) --extra atoms movie --torch "$(TORCH)"
	$(BIN)/python tools/dist_check.py dist --python $(PYTHON) --versions lowest --torch "$(TORCH)"

licences: setup
	$(BIN)/python tools/licences.py > THIRD_PARTY.md

clean:
	rm -rf $(VENV) dist build demo scale
