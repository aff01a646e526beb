# Everything runs from a fresh clone: the first target that needs it creates .venv and installs into it.
PYTHON ?= python3
BIN := .venv/bin
RUNTIME := .venv/.runtime-installed
DEV := .venv/.dev-installed
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: install demo lab bench torture torture-serve test test-all check format clean

install: $(DEV)

# torch on its own and first: an open range could resolve to a build for another device, of several gigabytes.
$(RUNTIME): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -c constraints.txt -e '.[serve]'
	touch $@

$(DEV): $(RUNTIME)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	-$(BIN)/python scripts/transformers_tests.py
	touch $@

demo: $(RUNTIME)
	$(BIN)/ritornello demo

lab: $(RUNTIME)
	$(BIN)/ritornello lab run all --quick

# Other people's models want other versions: an environment of its own. Their requirements are left out (--no-deps):
# they pin another torch. THEMES="training decode": only these.
bench: constraints.txt
	test -x .bench/bin/python || $(PYTHON) -m venv .bench
	.bench/bin/python -m pip install -q "$$(grep '^torch==' constraints.txt)"
	.bench/bin/python -m pip install -q -c constraints.txt -e '.[serve]' transformers
	.bench/bin/python -m pip install -q --no-deps open-mythos==0.5.0
	.bench/bin/python -m benchmarks $(THEMES)

# What a run survives: kills, failing disks, power cuts, damage, signals.
torture: $(RUNTIME)
	$(BIN)/python -m benchmarks.torture

# What the server survives: hostile bodies, slow, dead and too many clients, its end. GROUPS="fuzz drain": only these.
torture-serve: $(DEV)
	$(BIN)/python -m benchmarks.torture.serve $(GROUPS)

test: $(DEV)
	$(PYTEST)

test-all: $(DEV)
	$(PYTEST) -m ''

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(BIN)/python scripts/line_budget.py

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .bench build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
