# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
FOLDERS := $(wildcard challenge-*)

.PHONY: demo test mock-apis format check clean $(FOLDERS:challenge-%=serve-%)

demo: $(READY)
	$(BIN)/python demo.py

test: $(READY)
	$(BIN)/python -m pytest

# make serve-1 serves challenge-1 on port 8001.
$(FOLDERS:challenge-%=serve-%): serve-%: $(READY)
	cd challenge-$* && ../$(BIN)/python -m uvicorn app:app --port 800$*

# Product APIs that fail, limit and stall, for challenge-1's fetch.py.
mock-apis: $(READY)
	cd challenge-1 && ../$(BIN)/python simulators.py

format: $(VENV)/.ready-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@for folder in $(FOLDERS); do echo "mypy $$folder"; \
	  (cd $$folder && ../$(BIN)/mypy --config-file ../mypy.ini .) || exit 1; done

$(READY): requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, e.g. make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "This Python cannot make virtual environments: install its venv package (Debian: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.ready-dev: $(READY) requirements-dev.txt requirements-services.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache htmlcov .coverage .coverage.*
