# Each target makes what it needs: a fresh clone and a Python >= 3.10 are enough. A second run installs nothing
# and needs no network.
#
#   make demo       train a small CNN, no learning rate given; ARGS="--steps 200" passes options on
#   make test       everything that takes seconds, in two processes; ARGS="-k demo" passes options on, WORKERS=0 runs
#                   all in one (for --pdb)
#   make test-slow  what takes minutes, but for make trust
#   make trust      faults, interrupts, call orders, resumed runs, planted faults: a table of what was tried and held,
#                   about 20 minutes; ARGS=--write puts it into docs/guarantees.md
#   make bench      whole steps, update and rates against torch's own, about 8 minutes: JSON and pictures in
#                   bench/results/, tables at the end; ARGS="-k step" takes a part
#   make lint       ruff, mypy, import-linter, clang-format
#   make trainers   the scripts of examples/trainers, with AdamWLW and with AdamW, about 9 minutes; ARGS="NAME --write"
#                   puts a script's row into the documentation's table, ARGS=--write all
#   make docs       the documentation's pages in site/; a broken link fails
#   make package    wheel and source distribution, each installed in a fresh environment and tried there, 3 minutes
#   make clean      start over
#
# Which torch: when $(PYTHON) has one in 2.11 to 2.14 it is used as it is, from where it is; nothing is installed
# into that interpreter. Otherwise $(TORCH) is installed into $(VENV): TORCH="torch==2.12.1" takes another one, pip's
# own settings (PIP_INDEX_URL) take it from elsewhere, for instance from PyTorch's index of CPU wheels.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
WORKERS ?= 2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
# One stamp for each choice of interpreter and torch: another choice makes the environment anew.
BASE := $(VENV)/base-$(firstword $(shell printf '%s' '$(PYTHON) $(TORCH)' | cksum))
READY := $(VENV)/ready
CSRC := $(wildcard csrc/*)

# Threads that wait sleep instead of spinning: a little slower on an idle machine, twenty times faster on one whose
# cores are busy with something else.
demo test test-slow trust: export OMP_WAIT_POLICY ?= passive

.PHONY: demo test test-slow trust bench trainers lint docs package clean

demo: $(READY)
	$(PY) -m examples.demo $(ARGS)

# Not in pytest's own configuration: a single test starts sooner without.
PYTEST := $(PY) -m pytest -n $(WORKERS) --dist worksteal -p no:benchmark

test: $(READY)
	$(PYTEST) $(ARGS)

test-slow: $(READY)
	$(PYTEST) -m slow --ignore=tests/trust $(ARGS)

trust: $(READY)
	$(PYTEST) -m "slow or not slow" tests/trust $(ARGS)

bench: $(READY)
	$(PY) -m pytest bench -q --benchmark-quiet --benchmark-json=bench/results/latest.json $(ARGS)
	$(PY) bench/report.py bench/results/latest.json
	$(PY) bench/draw.py bench/results/latest.json --out bench/results

# Through their modules: a command may lie beside another interpreter, whose packages are shared.
CLANG_FORMAT := $(PY) -c 'import clang_format; clang_format.clang_format()'
LINT_IMPORTS := $(PY) -c 'from importlinter.cli import lint_imports_command as main; main()' --no-logo --no-cache

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(LINT_IMPORTS)
	$(CLANG_FORMAT) --dry-run --Werror $(CSRC) $(wildcard tests/update/fuzz/* tests/update/emulator/*)

trainers: $(VENV)/trainers-ready
	$(PY) -m pytest -q -p no:benchmark tests/test_integrations.py
	$(PY) -m examples.trainers $(ARGS)

docs: $(VENV)/docs-ready
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build
	@echo "open site/index.html, or with search: $(PY) -m http.server -d site"

package: $(READY)
	bash .ci/package $(PY)

clean:
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	if [ -e $(VENV)/made-by-make ]; then rm -rf $(VENV); fi

# These first: without build isolation the build uses the environment's own, and a fresh one may have none.
$(READY): $(BASE) pyproject.toml setup.py $(CSRC)
	$(PIP) 'setuptools>=77' ninja
	$(PIP) --no-build-isolation -e '.[demo,test,lint]' -c $(VENV)/constraints
	@touch $@

# The packages of the extra alone: to install it by name would build the package anew.
EXTRA := import sys; from importlib.metadata import requires; \
  print(*(repr(r.split(";")[0]) for r in requires("lwas_fast") if sys.argv[1] in r.split(";")[-1]))

$(VENV)/%-ready: $(READY)
	$(PY) -c "$$EXTRA" $* | xargs $(PIP) -c $(VENV)/constraints
	@touch $@

# Prints what makes the packages of the running interpreter visible to another environment, if a fitting torch is
# among them. Not venv's --system-site-packages: from a virtual environment that shows the packages of the Python
# below it, not its own.
define SHARE_TORCH
import importlib.metadata, sys
if sys.version_info < (3, 10):
    sys.exit("lwas_fast needs Python >= 3.10, and this is " + sys.version.split()[0] + "; try PYTHON=python3.12")
try:
    import torch
    version = importlib.metadata.version("torch")
    if (2, 11) <= tuple(map(int, version.split(".")[:2])) < (2, 15):
        print("using torch", version, "of", sys.executable, file=sys.stderr)
        for folder in sys.path:
            if folder.endswith(("site-packages", "dist-packages")):
                print(f"import site; site.addsitedir({folder!r})")
    else:
        print("torch", version, "of", sys.executable, "does not fit (2.11 to 2.14)", file=sys.stderr)
except Exception as error:
    print("no torch in", sys.executable, f"({error})", file=sys.stderr)
endef
export SHARE_TORCH EXTRA

$(BASE):
	@if [ -e $(VENV) ] && [ ! -e $(VENV)/made-by-make ]; then echo \
	  "$(VENV) was not made by this Makefile: remove it, or name another folder with VENV=..." >&2; exit 1; fi
	rm -rf $(VENV) && mkdir -p $(VENV) && touch $(VENV)/made-by-make
	@$(PYTHON) -c "$$SHARE_TORCH" > $(VENV)/share.pth
	$(PYTHON) -m venv $(VENV)
	@if [ -s $(VENV)/share.pth ]; then mv $(VENV)/share.pth $(VENV)/lib/python*/site-packages/; \
	  else echo "installing $(TORCH)"; $(PIP) '$(TORCH)'; fi
	@# Nothing that is installed later may replace that torch.
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/constraints
	@touch $@
