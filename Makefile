# What people do often. What a target needs is installed into .venv by the first that needs it: the
# package for those that run it, the tools of tests and benchmarks beside it for the rest.
VENV   := .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
PYTEST := pytest
PARALLEL := -n 2 --no-loadscope-reorder
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help install run check test soak load lint bench serve ui image up down clean

help:            ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# each is made anew when what is to be installed changes
PACKAGE := $(VENV)/.installed
TOOLS   := $(VENV)/.installed-tools
INSTALL := pip install --quiet --disable-pip-version-check

$(PACKAGE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.12"'
	@echo "installing what a run needs into $(VENV), which takes a minute or two, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) -c constraints.txt torch
	$(BIN)/$(INSTALL) -c constraints.txt -e .
	@touch $@

$(TOOLS): $(PACKAGE)
	@echo "installing what tests and benchmarks need besides, once"
	$(BIN)/$(INSTALL) -c constraints.txt -e '.[test]'
	@# aside: torchmetrics takes it where it finds it, and it needs torchvision
	$(BIN)/$(INSTALL) --no-deps --target $(VENV)/oracles torch-fidelity==0.4.0
	@touch $@

install: $(PACKAGE)  ## Install the package and what it needs into .venv

run: $(PACKAGE)  ## Run the whole pipeline on the embedded digits
	$(BIN)/ddpm run configs/digits.yaml

check: $(TOOLS) lint  ## Check style and types, run the tests that start no process
	$(BIN)/python -m $(PYTEST) $(PARALLEL) tests/unit

test: $(TOOLS) lint  ## Check style and types, run the test suite
	$(BIN)/python -m $(PYTEST) $(PARALLEL)

lint: $(TOOLS)   ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: $(TOOLS)   ## Kill trainings and nodes at random, longer than the suite may take
	$(BIN)/python -m pytest tests/soak --deselect tests/soak/test_load.py -s

load: $(TOOLS)   ## Load a service with all kinds of clients and kill its replicas, for five minutes
	$(BIN)/python -m pytest tests/soak/test_load.py -s

PEERS  := .venv-peers
$(PEERS)/.installed:
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/$(INSTALL) -c constraints.txt torch pillow
	$(PEERS)/bin/$(INSTALL) webdataset mosaicml-streaming
	@touch $@

bench: $(TOOLS) $(PEERS)/.installed  ## Run the benchmarks that need no model, into tests/benchmarks/RESULTS.md
	$(BIN)/python -m tests.benchmarks.record preprocess
	$(BIN)/python -m tests.benchmarks.record preprocess --decoders
	$(BIN)/python -m tests.benchmarks.record preprocess --scale
	$(BIN)/python -m tests.benchmarks.record load_batches --peers $(PEERS)/bin/python
	$(BIN)/python -m tests.benchmarks.record train_step
	$(BIN)/python -m tests.benchmarks.record train_step --profile
	$(BIN)/python -m tests.benchmarks.record ray_overhead
	$(BIN)/python -m tests.benchmarks.record precision
	$(BIN)/python -m tests.benchmarks.record kept_memory
	$(BIN)/python -m tests.benchmarks.record evaluate
	$(BIN)/python -m tests.benchmarks.record engine
	$(BIN)/python -m tests.benchmarks.record serve_load
	$(BIN)/python -m tests.benchmarks.record scale

serve: $(PACKAGE) ## Serve the digits that `make run` trained
	$(BIN)/ddpm serve digits@champion --replicas 2

ui: $(PACKAGE)   ## Open the MLflow UI on the runs of this folder
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db

COMPOSE := docker compose -f infra/compose.yaml

image:           ## Build the image of infra/ (ACCELERATOR=cpu TORCH_INDEX=URL for a CPU torch)
	docker build -f infra/docker/Dockerfile -t ray-ddpm:0.1.0 --build-arg ACCELERATOR=$(or $(ACCELERATOR),cuda) --build-arg TORCH_INDEX=$(TORCH_INDEX) .

up: infra/.env   ## Start a Ray cluster, MLflow, storage and monitoring in containers (WORKERS=2)
	$(COMPOSE) up --detach --scale worker=$(or $(WORKERS),2)

down:            ## End it; what it stored stays
	$(COMPOSE) down

# each name without a value gets a random one
infra/.env:
	@umask 077; while read -r line; do case "$$line" in \#*|'') ;; *=) echo "$$line$$(openssl rand -hex 24)";; *) echo "$$line";; esac; done < infra/.env.example > $@
	@echo "made $@"

clean:           ## Delete what runs made here: outputs, runs, models
	rm -rf runs samples schedule.png mlruns mlflow.db mlflow.db.lock
