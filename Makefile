# Every target works on a fresh clone without a step before it; pip reads its own variables (PIP_INDEX_URL, PIP_FIND_LINKS, ...).

PYTHON ?= python3
# The torch that goes into .venv. The index or folder that pip takes it from decides whether it is a CPU or a CUDA build.
TORCH ?= torch==2.13.0
# Processes that run the tests of `make test`, each whole files.
TEST_WORKERS ?= 2
DEMO_SECONDS ?= 90
FAULT_KILLS ?= 20
FAULT_FLIPS ?= 500
FAULT_EPISODES ?= 40
FAULT_CONNECTS ?= 300
FAULT_MESSAGES ?= 120000
SOAK_MINUTES ?= 10
QUIET_MINUTES ?= 15
# For example SOAK="--every-s 10 --out soak.png".
SOAK ?=
FAULT_ACTOR_KILLS ?= 20
FAULT_LIMITED_KILLS ?= 30
FAULT_SCHEDULE ?= 240
# Seed of the schedule of all faults together; empty: a new one each time, which is printed.
FAULT_SEED ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
FUZZER_INSTALLED := .venv/.fuzzer-installed
PEERS_INSTALLED := .venv-peers/.installed
# A Python 3.10 for the oldest versions, if the PATH or pyenv has one; else PYTHON.
PYTHON310 ?= $(shell for p in python3.10 $$HOME/.pyenv/versions/3.10.*/bin/python; do $$p -c 'import ensurepip' 2>/dev/null && { echo $$p; exit; }; done; echo $(PYTHON))
PINS := tests/environments
# Variables for tests of the client in environments that have only the client; the server is that of .venv.
OF_CLIENT := SERVER_PYTHON=$(CURDIR)/.venv/bin/python
QUICK_TESTS := $(wildcard tests/contract/test_golden.py tests/contract/test_grpc_options.py tests/unit/protos/test_codec_*.py \
	tests/unit/client/test_client_values.py tests/unit/client/test_recording.py tests/unit/client/test_writer_rows.py \
	tests/integration/test_recorders_gymnasium.py tests/integration/test_recorders_vector.py tests/integration/test_tdmpc2.py \
	tests/integration/test_torchrl_client.py)
# Minari 0.5.4 needs Python 3.11 and numpy 2, which none of these environments has.
OF_MINARI := $(addprefix tests/integration/test_datasets_,minari.py export.py sizes.py examples.py)
CLIENT_TESTS := $(filter-out $(OF_MINARI),$(QUICK_TESTS) $(wildcard tests/unit/client/test_*.py tests/unit/protos/test_*.py \
	tests/integration/test_recorders_*.py tests/integration/test_datasets_*.py tests/integration/test_spool_command.py \
	tests/integration/test_jax.py))
# For example BENCH="--quick", BENCH="--only W1 --rounds 31", or, without a GPU, `make bench-gpu BENCH="--device cpu --dry-run"`.
BENCH ?=
REQUIREMENTS := examples/requirements.txt tests/requirements.txt docs/site/requirements.txt

.DEFAULT_GOAL := help
.PHONY: help install test test-faults test-quiet test-browser test-compose test-oldest test-newt soak lint types serve demo bench bench-peers bench-gpu configuration stubs docs docs-serve dist clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv and install the three distributions and their tools

# torch first and by itself, so that TORCH decides which one: it is left out of the constraints and satisfies all later requirements.
$(INSTALLED): constraints.txt protos/pyproject.toml client/pyproject.toml server/pyproject.toml $(REQUIREMENTS)
	$(PYTHON) -m venv .venv
	sed '/^torch==/d' constraints.txt > .venv/constraints.txt
	$(BIN)/pip install -c .venv/constraints.txt "$(TORCH)"
	$(BIN)/pip install -c .venv/constraints.txt -e ./protos -e "./client[torch,jax,cli]" -e "./server[http]" $(REQUIREMENTS:%=-r %)
	touch $@

test: lint types .venv-quick/.installed ## check everything: lint, types, tests, and the client with TD-MPC2's pins
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
	$(OF_CLIENT) .venv-quick/bin/python -m pytest -q $(QUICK_TESTS) --deselect tests/integration/test_torchrl_client.py::test_example_learns

test-oldest: $(INSTALLED) .venv-oldest/.installed .venv-tdmpc2/.installed ## test the client at its oldest versions and with TD-MPC2's pins, about 10 minutes
	$(OF_CLIENT) .venv-oldest/bin/python -m pytest $(CLIENT_TESTS)
	$(OF_CLIENT) .venv-tdmpc2/bin/python -m pytest $(CLIENT_TESTS)

test-newt: $(INSTALLED) .venv-newt/.installed ## test the client with Newt's pins
	$(OF_CLIENT) .venv-newt/bin/python -m pytest $(CLIENT_TESTS)

# Each of these has a torch of its own, about 5 GB if pip takes a CUDA build.
.venv-oldest/.installed .venv-newt/.installed: PYTHON_OF = $(PYTHON310)
.venv-tdmpc2/.installed: PYTHON_OF = $(PYTHON)
.venv-oldest/.installed .venv-newt/.installed .venv-tdmpc2/.installed: .venv-%/.installed: $(PINS)/%.txt $(PINS)/requirements.txt client/pyproject.toml protos/pyproject.toml
	rm -rf .venv-$*
	$(PYTHON_OF) -m venv .venv-$*
	.venv-$*/bin/pip install --upgrade pip
	.venv-$*/bin/pip install -c $< -e ./protos -e "./client[torch,torchrl,jax,recorders,cli,hdf5]"
	.venv-$*/bin/pip install -c $< -r $(PINS)/requirements.txt
	touch $@

# The pins of TD-MPC2 with the torch of .venv, in a minute: links are made after the last call of pip, which would follow them.
.venv-quick/.installed: $(INSTALLED) $(PINS)/tdmpc2.txt $(PINS)/quick.txt client/pyproject.toml protos/pyproject.toml
	rm -rf .venv-quick
	$(PYTHON) -m venv .venv-quick
	sed '/^torch==/d' $(PINS)/tdmpc2.txt > .venv-quick/constraints.txt
	.venv-quick/bin/pip install -c .venv-quick/constraints.txt -e ./protos -e ./client -r $(PINS)/quick.txt
	.venv-quick/bin/pip install -c .venv-quick/constraints.txt --no-deps tensordict torchrl
	$(BIN)/python $(PINS)/share_torch.py .venv-quick/lib/python3.*/site-packages
	touch $@

test-faults: $(INSTALLED) $(FUZZER_INSTALLED) ## inject real faults, about 30 minutes: kills, networks, disks, damage, fuzzing
	FAULT_LONG=1 FAULT_KILLS=$(FAULT_KILLS) FAULT_FLIPS=$(FAULT_FLIPS) FAULT_EPISODES=$(FAULT_EPISODES) \
	FAULT_ACTOR_KILLS=$(FAULT_ACTOR_KILLS) FAULT_LIMITED_KILLS=$(FAULT_LIMITED_KILLS) FAULT_CONNECTS=$(FAULT_CONNECTS) FAULT_MESSAGES=$(FAULT_MESSAGES) \
	FAULT_SCHEDULE=$(FAULT_SCHEDULE) FAULT_SEED=$(FAULT_SEED) $(BIN)/python -m pytest tests/faults tests/integration/test_examples.py \
	tests/integration/test_device_processes.py -s

test-quiet: $(INSTALLED) ## leave connections of every kind quiet for QUIET_MINUTES, under the default configuration
	QUIET_MINUTES=$(QUIET_MINUTES) $(BIN)/python -m pytest tests/faults/test_quiet.py -s

# Coverage-guided fuzzing; not available everywhere, so the tests that need it are skipped with this reason if it is missing.
$(FUZZER_INSTALLED): tests/faults/requirements.txt $(INSTALLED)
	-$(BIN)/pip install -r tests/faults/requirements.txt && touch $@

test-browser: $(INSTALLED) ## test the web page in Debian's Chromium, which is installed if it is missing
	command -v chromedriver >/dev/null || { apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver; }
	BROWSER_TEST=1 $(BIN)/python -m pytest tests/browser

test-compose: $(INSTALLED) ## build and run docker compose on a real engine: restarts, kills, nothing lost; skipped without one
	COMPOSE_TEST=1 $(BIN)/python -m pytest tests/compose -s

soak: $(INSTALLED) ## run a mixed load for SOAK_MINUTES, with a line a minute; fail if the server's memory grows
	$(BIN)/python -m benchmarks.soak --minutes $(SOAK_MINUTES) $(SOAK)

lint: $(INSTALLED) ## check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED) ## check types, those of the client also for Python 3.10
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.10 -p touchline -p touchline_protos

serve: $(INSTALLED) ## run the server on cfg/default.toml
	$(BIN)/touchline-server serve --config cfg/default.toml

demo: $(INSTALLED) ## play robot soccer into a server and train on it for DEMO_SECONDS
	$(BIN)/python examples/demo.py --seconds $(DEMO_SECONDS)

bench: $(INSTALLED) ## measure against TD-MPC2's buffer, about 10 minutes, into docs/benchmarks
	$(BIN)/python -m benchmarks run $(BENCH)

bench-peers: $(INSTALLED) $(PEERS_INSTALLED) ## measure against Reverb, about 15 minutes, into docs/benchmarks
	$(BIN)/python -m benchmarks peers $(BENCH)

bench-gpu: $(INSTALLED) ## test, then measure store and learner on a CUDA device, in 8 minutes, into docs/benchmarks
	$(BIN)/python -m benchmarks gpu $(BENCH)

# Reverb needs a TensorFlow, a numpy and a protobuf of its time, so it has an environment of its own.
$(PEERS_INSTALLED): benchmarks/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install -r benchmarks/peers/requirements.txt
	touch $@

configuration: $(INSTALLED) ## generate default.toml, docs/configuration.md and compose's variables from the configuration's sections
	$(BIN)/python server/generate_configuration.py

stubs: ## regenerate the stubs of the .proto
	$(PYTHON) protos/generate_stubs.py

# The notice is of mkdocs-material, about its end in 2027.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1
docs: $(INSTALLED) ## build the site of all pages and of the reference into build/site
	$(BIN)/mkdocs build

docs-serve: $(INSTALLED) ## serve the site on 127.0.0.1:8000 and build it again after each change
	$(BIN)/mkdocs serve

dist: $(INSTALLED) ## build wheels and sdists of the three distributions into dist
	rm -rf dist
	for folder in protos client server; do $(BIN)/python -m build --no-isolation --outdir dist $$folder || exit 1; done

clean: ## remove .venv and the leftovers of tools
	rm -rf .venv .venv-* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
