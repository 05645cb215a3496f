# All targets work in a clean clone with Python 3.11 or newer. Start with `make demo` and `make test`.
# Targets of maintainers are in tests/Makefile and experiments/Makefile; they too run as `make NAME` from this folder.
PYTHON ?= python3
PIP_FLAGS ?=
# The lock was made on Linux with Python 3.11. On a system that needs another package, install without hashes: make LOCK= install
LOCK ?= requirements.lock
BIN := .venv/bin
JOBS ?= 3
# Without bytecode files, each test process would compile all modules again.
TESTING := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1
INSTALLED := .venv/.installed

.PHONY: help install demo serve test test-all replay budget lint reproduce docs clean

HELP ?= Makefile
help:  ## list the targets
	@grep -hE '^[a-z0-9.-]+:.*##' $(HELP) | sed -E 's/:.*## /\t/' | expand -t 20
	@echo 'For maintainers: make help HELP=tests/Makefile, make help HELP=experiments/Makefile'

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

test-all: install  ## run every test with long profiles, and endurance, part by part (an hour)
	$(TESTING) $(BIN)/python -m tests.run all

replay: install  ## compare decisions and bits with tests/replay.json; BASE=HEAD~1 compares with that commit, line by line
	$(TESTING) $(BIN)/python -m tests.replay $(if $(BASE),--base $(BASE))

budget: install  ## print the price of each capability, settings and walks, and their differences from tests/budget.json
	$(TESTING) $(BIN)/python -m tests.budget

lint: install  ## check style, format, types, and installed packages for known vulnerabilities
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m experiments.audit

reproduce: install  ## regenerate the published figures whose code has changed, and docs/results*.md (hours; can be stopped and continued)
	$(BIN)/python -m experiments.reproduce

.venv/.docs: $(INSTALLED)
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt $(if $(LOCK),--no-build-isolation) -e '.[docs]'
	@touch $@

docs: .venv/.docs  ## build the documentation into out/docs; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs out/docs

clean:  ## remove the output of all targets except .venv
	rm -rf out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

include tests/Makefile experiments/Makefile
