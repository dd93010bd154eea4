# All targets use one virtual environment, .venv, and install it when needed.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(if $(shell command -v $(name)),$(name))))
BIN := .venv/bin
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo test test-fast chaos check families bench serve clean docs lock image-test format

help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

install: .venv/installed  ## Create .venv with all dependencies

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 …"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[server,train,dev]'
	@# As pip does, but on all cores, and without rarely imported files: tests, and the models of transformers.
	$(BIN)/python -m compileall -q -q -j 0 -x '/tests/|/transformers/models/' .venv/lib || true
	touch $@

demo: install  ## Train a small model on a small dataset, download the adapter, compare answers
	$(BIN)/qlora demo

# With bytecode, whatever the environment says: tests start the same programs hundreds of times.
test: install  ## All tests that need no GPU; three files at a time, since some wait
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

FAST := $(addprefix tests/qlora_service/,actions artifacts chat data domain planning queue specs store webhooks \
  test_errors.py test_settings.py)

test-fast: install  ## Tests that start no process and train nothing: under a minute on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(FAST)

chaos: install  ## Fault injection in full size (an hour and more): make chaos ONLY=kills
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.chaos $(if $(ONLY),--only $(ONLY))

check: install  ## Lint, formatting, types, import contracts, Dockerfile, compose file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint --config docker/.hadolint.yaml docker/Dockerfile
	$(BIN)/docker-compose -f deploy/compose.yaml config -q
	$(BIN)/docker-compose -f deploy/compose.yaml -f deploy/compose.cpu.yaml config -q

families: install  ## Every causal-LM class of transformers, tiny: trained and certified, or refused (half an hour)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.families --output families.json

bench: install  ## Benchmarks, alone on the machine: make bench NAME=data
	$(BIN)/python -m tests.benchmarks $(NAME)

serve: install  ## API and worker on 127.0.0.1:8080, data in ./data
	$(BIN)/qlora serve

image-test: install  ## Build the Docker image without an engine and run a job in it (root, Debian)
	bash docker/image-test.sh

format: install  ## Apply ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install  ## Generate docs/settings.md from the settings' declarations
	$(BIN)/python -m tests.settings_page

lock: install  ## Pin the installed versions in constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean:  ## Remove build products, not ./data
	rm -rf .venv .cache build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache demo-output
