# Everything from a clean clone, Python 3.11 or newer: `make demo`, `make test`.
PYTHON ?= python3
PIP_FLAGS ?=
# Made on Linux with Python 3.11; where a package more is wanted: make LOCK= ..., without hashes.
LOCK ?= requirements.lock
BIN := .venv/bin
JOBS ?= 3
# Without bytecode each process of the tests compiles all that it imports again.
TESTING := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1
INSTALLED := .venv/.installed

.PHONY: help install lock demo serve test test-all test-changed test-environments lint bench reproduce tiers stress attack clients faults soak hostile mutate rivals llama sglang replicas page docs wheels tune gpu gpu-dry clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

EVERYTHING := '.[dev,all]'
# One line for each step; the end of its output if it fails.
QUIET = @printf '  %s ... ' '$(1)'; $(2) > out/install.log 2>&1 && echo done || \
	{ echo failed; tail -n 20 out/install.log; exit 1; }

install: $(INSTALLED)  ## .venv with everything that demo, tests and experiments want

$(INSTALLED): pyproject.toml constraints.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 2; }
	@mkdir -p out && echo "Installing into .venv takes some minutes; pip's output goes to out/install.log."
	$(call QUIET,environment,$(PYTHON) -m venv .venv)
	$(if $(LOCK),$(call QUIET,packages,$(BIN)/pip install $(PIP_FLAGS) --require-hashes -r $(LOCK)))
	$(call QUIET,torch and this project,$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt \
		$(if $(LOCK),--no-build-isolation) -e $(EVERYTHING))
	@touch $@

# torch and triton are not in the lock: which build of them is right, and so its hash, is the machine's to say.
# They come in the second step above, in the version of constraints.txt.
lock: install  ## requirements.lock anew: every package with the hashes of its files (minutes)
	$(BIN)/pip-compile --quiet --generate-hashes --strip-extras --no-header --no-annotate --no-emit-index-url \
		--no-emit-find-links --no-emit-trusted-host --unsafe-package torch --unsafe-package triton \
		-c constraints.txt $(addprefix --extra ,dev engine lab serve-extras) -o requirements.lock pyproject.toml

demo: install  ## conversations through the engine, with and without the cache: a table and a figure
	@$(BIN)/python -m experiments.run_sharegpt --name demo --out out
	@echo "Next: make serve: the built-in model and its page on http://127.0.0.1:8000"
	@echo "      $(BIN)/engine chat: a chat in this terminal"
	@echo "      $(BIN)/hybridcache simulate --trace chat --gib 1,4,16: the cache on a made-up trace"

serve: install  ## the built-in model behind http://127.0.0.1:8000/v1
	$(BIN)/engine serve

# Which tests these are: tests/selection.py. JOBS: processes side by side, one more than cores, since some tests wait.
test: install  ## a representative part of the tests, in four minutes on two cores
	$(TESTING) $(BIN)/pytest --processes $(JOBS)

test-all: install  ## every test with long profiles, attack, soak, browser and mutation, part by part (hours)
	$(TESTING) $(BIN)/python -m tests.run all

test-changed: install  ## the tests that the changes since main can affect, by imports
	$(TESTING) $(BIN)/python -m tests.run changed

test-environments: install  ## the suite in background shells, without a terminal, under load, as another user ...
	$(TESTING) $(BIN)/python -m tests.run environments

lint: install  ## ruff, format, types, known faults of what is installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m experiments.system.audit

# A rented machine has torch, triton and transformers, and often no network: take what is there.
bench: install  ## the timed figures, one after another, on a machine that does nothing else
	$(BIN)/python -m experiments.benchmarks.tree
	$(BIN)/python -m experiments.benchmarks.simulate
	$(BIN)/python -m experiments.benchmarks.overhead
	$(BIN)/python -m experiments.benchmarks.optimum
	$(BIN)/python -m experiments.benchmarks.engine

reproduce: install  ## every published figure at one commit, and docs/results.md (six hours; may be stopped and repeated)
	$(BIN)/python -m experiments.reproduce

tiers: install  ## memory below the device: a store whose writer is killed 200 times; restarts, spilling, memory used
	$(BIN)/python -m experiments.system.kill_store
	$(BIN)/python -m experiments.benchmarks.tiers

stress: install  ## ten million random operations on the cache, its invariants checked as they go
	$(BIN)/python -m experiments.system.stress_tree

attack: install  ## cache, engine, server and files against models and clients of their own, nine minutes
	$(BIN)/python -m experiments.system.attack

# Beside .venv and not in it: what they bring along is theirs. litellm and instructor ask for versions (of certifi, jiter, rich)
# that openai's newest client, or an index, has not, and pip would go back a hundred releases: they come without what they ask for.
CLIENTS := anthropic langchain-openai langchain-anthropic 'pydantic-ai-slim[openai,anthropic]' openai-agents mcp \
	aiohttp docstring-parser fastuuid h2 'importlib-metadata<9' pydantic-settings python-dotenv requests tenacity tokenizers typer

out/clients/.installed: Makefile
	$(BIN)/pip install $(PIP_FLAGS) --upgrade --target out/clients -c constraints.txt $(CLIENTS)
	$(BIN)/pip install $(PIP_FLAGS) --upgrade --target out/clients --no-deps litellm instructor
	if command -v npm; then npm install --no-save --prefix out/clients openai@6; fi
	@touch $@

clients: install out/clients/.installed  ## published clients and frameworks for agents against the server
	PYTHONPATH=out/clients OMP_NUM_THREADS=1 $(BIN)/pytest tests/engine/server/test_agents.py \
		tests/engine/server/test_other_clients.py tests/engine/server/test_clients.py tests/engine/server/test_messages.py tests/engine/server/test_responses.py

faults: install  ## clients, sockets, processes, memory, clock and disk that fail: all memory is accounted for after
	$(BIN)/python -m experiments.system.faults

soak: install  ## 200,000 requests with everything on (hours): nothing grows, every count adds up
	$(BIN)/python -m experiments.system.soak --requests 200000

hostile: install  ## how long another client waits for a token, whatever body somebody sends
	$(BIN)/python -m experiments.system.hostile

# Beside .venv and not in it: nothing else needs it.
out/mutation/.installed: Makefile
	$(BIN)/pip install $(PIP_FLAGS) --upgrade --target out/mutation/site -c constraints.txt mutmut==3.8.1
	@touch $@

mutate: install out/mutation/.installed  ## nightly: mutate cache, scheduler and lease; fails if an unlisted mutant survives (hours)
	PYTHONPATH=out/mutation/site $(BIN)/python -m tests.mutation $(MUTANTS)

rivals:  ## flash-linear-attention's kernels, for the kernel benchmark alone to find
	$(PYTHON) -m pip install $(PIP_FLAGS) --no-deps --upgrade --target out/rivals 'fla-core>=0.6,<0.7' einops

# SGLang and what it can not be stood in for without, beside .venv and not in it: it asks for another torch.
SGLANG := sglang==0.5.23 apache-tvm-ffi==0.1.11 compressed-tensors==0.18.0 dill einops msgspec orjson psutil pyzmq \
	setproctitle uvloop xgrammar==0.2.7 xxhash

out/sglang/.installed: Makefile
	$(BIN)/pip install $(PIP_FLAGS) --no-deps --upgrade --target out/sglang $(SGLANG)
	@touch $@

sglang: install out/sglang/.installed  ## SGLang on a CPU with our cache in it: its scheduler, both trees side by side
	PYTHONPATH=out/sglang OMP_NUM_THREADS=1 $(BIN)/pytest -x tests/export/sglang
	PYTHONPATH=out/sglang OMP_NUM_THREADS=1 $(BIN)/python -m experiments.benchmarks.sglang

out/ray/.installed: Makefile
	$(BIN)/pip install $(PIP_FLAGS) --upgrade --target out/ray 'ray[serve]>=2.60,<3' -c constraints.txt
	@touch $@

replicas: install out/ray/.installed  ## replicas on Ray Serve: a death, scaling, a grid of runs on a cluster (two minutes)
	PYTHONPATH=out/ray OMP_NUM_THREADS=1 $(BIN)/pytest tests/engine/fleet
	PYTHONPATH=out/ray OMP_NUM_THREADS=1 $(BIN)/pytest tests/lab/test_on_ray.py

page: install  ## the page in a Chromium (pip install playwright first): how fast it is, and its pictures
	$(BIN)/python -m experiments.benchmarks.page
	$(BIN)/python -m experiments.benchmarks.page_figures

.venv/.docs: $(INSTALLED)
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt $(if $(LOCK),--no-build-isolation) -e '.[docs]'
	@touch $@

docs: .venv/.docs  ## the documentation as a site in out/docs; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs out/docs

out/wheels/.installed: constraints.txt
	$(PYTHON) -m venv out/wheels
	out/wheels/bin/pip install $(PIP_FLAGS) -q -c constraints.txt build setuptools numpy sortedcontainers tqdm
	@touch $@

wheels: out/wheels/.installed  ## what is published: the cache with its laboratory, and the engine
	out/wheels/bin/python -m experiments.system.wheels

llama:  ## llama.cpp for this processor, for its benchmark alone to find (some minutes)
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" $(PYTHON) -m pip install $(PIP_FLAGS) --no-deps --upgrade --target out/llama \
		--no-binary llama-cpp-python 'llama-cpp-python==0.3.36' 'gguf>=0.19' diskcache

tune:  ## on a machine with a GPU: launch parameters that are fast there, into kernels/tuned.json
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m experiments.gpu.kernels --tune

gpu:  ## on a machine with a GPU: kernels, exactness, speed, serving; in parts that need not be repeated
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m experiments.gpu

gpu-dry:  ## the same script on the CPU: tiny shapes, interpreted
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m experiments.gpu --dry

clean:  ## what the other targets made, but not .venv
	rm -rf out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
