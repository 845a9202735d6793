# Needs Python 3.11 or newer and make; everything else goes into .venv, once.
# A distribution's own comes first: it is optimised, and the tests take a quarter less time by it
# than by one that was compiled without.
FITS := import ensurepip, sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(shell for python in /usr/bin/python3.11 python3.11 /usr/bin/python3 python3; do \
	$$python -c '$(FITS)' 2>/dev/null && echo $$python; done) python3)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := lora_fx passes export
ROOMS := $(SOURCES) tests benchmarks examples docs

# Tests start a hundred processes: each would compile all of this anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-docs test-clients test-web test-oldest test-matrix docs release-check fuzz mutants \
	lint types matrix bench bench-quick clean

help:
	@echo "make demo    train, export, swap and score on a real model, outputs under out/"
	@echo "make test    the test suite"
	@echo "make test-docs  pages, examples, the notebook and the wheel, as their readers run them"
	@echo "make test-oldest  a part of it, on the oldest versions that pyproject promises"
	@echo "make test-matrix  a part of it, on each Python that is here, with the newest versions"
	@echo "make docs    the site, into out/site; a broken link or reference is an error"
	@echo "make release-check  sdist, wheel, and the wheel in an empty environment"
	@echo "make test-clients  exported directories in optimum, onnxruntime-genai, sentence-transformers"
	@echo "make test-web  exported files in Node and in a headless browser"
	@echo "make fuzz    100,000 damaged files and 2,000 random graphs; FILES=, GRAPHS=, FROM="
	@echo "make mutants  changes of our own code that the tests should notice"
	@echo "make lint    ruff, rules and format"
	@echo "make types   mypy, strict, on an installed copy"
	@echo "make matrix  docs/KINDS.md: what works with what, measured"
	@echo "make bench   speed, memory and scaling; make bench-quick in two minutes"
	@echo "make clean   remove .venv, caches and outputs"

demo: .venv/demo.stamp
	$(BIN)/lora-fx demo

# Pages, examples, the notebook and the wheel are run as their readers run them: make test-docs.
PAGES := tests/docs tests/examples tests/test_tutorial.py tests/test_release.py

test: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(addprefix --ignore=,$(PAGES))

test-docs: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(PAGES)

# What our own files, runs and readers of other packages' models are held against.
OLDEST := tests/export tests/frontend/test_trace.py tests/cli/test_cli.py tests/oracle

test-oldest: .venv-oldest/dev.stamp
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n auto --dist worksteal $(OLDEST)

# Whatever is newest, so nothing is pinned: what a user of today gets.
PYTHONS ?= python3.11 python3.12 python3.13
MATRIX := tests/test_api.py tests/export/test_exporter.py tests/frontend/test_trace.py tests/passes \
	tests/cli/test_cli.py tests/examples

test-matrix:
	@for python in $(PYTHONS); do \
		$$python -c '' 2>/dev/null || { echo "$$python is not here"; continue; }; \
		home=.venv-matrix/$$(basename $$python); echo "== $$home"; \
		$$python -m venv $$home && \
		$$home/bin/python -m pip install --quiet --disable-pip-version-check \
			--upgrade --upgrade-strategy eager -e '.[dev]' && \
		OMP_NUM_THREADS=1 $$home/bin/python -m pytest -n auto $(MATRIX) || exit 1; \
	done

docs: .venv/dev.stamp
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs out/site
	@echo "out/site/index.html"

release-check: .venv/dev.stamp
	rm -rf dist build .venv-release
	$(BIN)/python -m build --quiet
	$(PYTHON) -m venv --upgrade-deps .venv-release
	.venv-release/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		dist/*.whl
	cd dist && ../.venv-release/bin/lora-fx --version && ../.venv-release/bin/lora-fx demo --help \
		&& ../.venv-release/bin/lora-fx doctor
	rm -rf build *.egg-info

test-clients: .venv/clients.stamp
	OMP_NUM_THREADS=1 LORA_FX_CLIENTS=.venv/clients \
		$(BIN)/python -m pytest -n auto --dist worksteal tests/clients

CHROMIUM ?= /usr/bin/chromium

test-web: .venv/web.stamp $(CHROMIUM)
	OMP_NUM_THREADS=1 LORA_FX_WEB=.venv/web LORA_FX_CHROMIUM=$(CHROMIUM) \
		$(BIN)/python -m pytest -n 2 --dist loadfile tests/web

FILES ?= 100000
GRAPHS ?= 2000
FROM ?= 1000

fuzz: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/hostile/fuzz.py $(FILES) $(FROM)
	OMP_NUM_THREADS=1 LORA_FX_GRAPHS=$(GRAPHS) LORA_FX_FROM=$(FROM) \
		$(BIN)/python -m pytest -n auto tests/test_property.py

mutants: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/mutants/run.py

lint: .venv/dev.stamp
	$(BIN)/ruff check $(ROOMS)
	$(BIN)/ruff format --check $(ROOMS)

# An editable install hides part of the package from mypy, so it checks a real copy, and the
# count of checked files must reach the count of source files.
types: .venv/dev.stamp
	rm -rf .typecheck build
	$(INSTALL) --no-deps --no-build-isolation --target .typecheck .
	rm -rf build
	cd .typecheck && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache \
		-p lora_fx | tee mypy.log
	@checked=$$(sed -nE 's/.*(found in|checked) ([0-9]+) source files?.*/\2/p' .typecheck/mypy.log); \
	existing=$$(find $(SOURCES) -name '*.py' | wc -l); \
	echo "mypy checked $${checked:-0} files, $$existing exist"; \
	test "$${checked:-0}" -ge "$$existing" && grep -q '^Success' .typecheck/mypy.log

matrix: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python tests/oracle/test_matrix.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/oracle/test_peft_types.py

bench: .venv/dev.stamp
	$(BIN)/python benchmarks/run.py

bench-quick: .venv/dev.stamp
	$(BIN)/python benchmarks/run.py --quick

clean:
	rm -rf .venv .venv-oldest .venv-matrix .venv-release .typecheck .mypy_cache .pytest_cache \
		.ruff_cache .hypothesis build dist out *.egg-info

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv --upgrade-deps .venv

.venv/demo.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[demo]'
	touch $@

.venv/dev.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev,demo]'
	$(INSTALL) --no-deps --upgrade --target .venv/zoo torchvision timm
	touch $@ .venv/demo.stamp

.venv/clients.stamp: .venv/dev.stamp tests/clients/requirements.txt
	rm -rf .venv/clients
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--target .venv/clients -r tests/clients/requirements.txt
	touch $@

/usr/bin/chromium:
	apt-get update -qq
	apt-get install -qq chromium

# Without its scripts onnxruntime-node fetches no binaries for graphics cards; those it has suffice.
.venv/web.stamp: .venv/dev.stamp tests/web/package.json tests/web/package-lock.json
	rm -rf .venv/web
	mkdir .venv/web
	cp tests/web/package.json tests/web/package-lock.json .venv/web
	npm ci --prefix .venv/web --ignore-scripts --no-audit --no-fund
	touch $@

.venv-oldest/dev.stamp: pyproject.toml constraints.txt tests/oldest_versions.py
	$(PYTHON) -m venv --upgrade-deps .venv-oldest
	$(PYTHON) tests/oldest_versions.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check \
		-c .venv-oldest/constraints.txt -e '.[dev,demo]'
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt --no-deps --target .venv-oldest/zoo torchvision timm
	touch $@
