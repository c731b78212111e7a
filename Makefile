# make demo          a day of events through a daemon and an emulated Mixpanel; KEEP=1 leaves them running
# make test          lint, types, tests; as root on Debian or Ubuntu it installs the tools that they use, else it names them
# make lint          lint and types only
# make coverage      the tests once more, with what they come to: half as long again
# make bench         how fast it is on this machine: everything, some ten minutes, and a page with plots in docs/bench
# make screenshots   renews those of the README, in docs/screenshots
# make clean         removes what the others made
#
# Everything but those tools is installed into .venv. PYTHON chooses the interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# What the tests use besides Python: the official Node.js client; systemd's own judgement of the units; calls that fail
# (fiu-run), clocks that jump (faketime), a log of what is written (strace), disks that lose power (mkfs.ext4, losetup);
# Prometheus, for the alert rules and the dashboard; a browser for the page (chromium).
# Each with the package that it comes in: a tool that is there already, wherever from, needs none, and the package of
# another origin's tool may not even be installable beside it. One at a time, so that what one distribution lacks (Ubuntu:
# chromium) doesn't keep the others away.
TOOLS := npm:npm systemd-analyze:systemd systemd-socket-activate:systemd fiu-run:fiu-utils faketime:faketime strace:strace \
  mkfs.ext4:e2fsprogs losetup:mount mount:mount prometheus:prometheus promtool:prometheus chromium:chromium
# Debian starts a server that it installs, for everybody to reach; one that is masked it doesn't.
MASKED := /etc/systemd/system/prometheus.service

# A virtual environment knows its own path and Python: of a clone that was moved, and after an upgrade of Python, it is made anew.
# Not one that another make may be busy with.
$(shell [ ! -e $(VENV)/.installed ] || \
  { { $(BIN)/bridged --version; [ $$? -lt 126 ]; } && $(BIN)/python -c 'import msgspec'; } >/dev/null 2>&1 || rm -rf $(VENV))

.PHONY: demo test coverage tools lint screenshots bench clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed
	@$(BIN)/bridged demo $(if $(KEEP),--keep) $(if $(EVENTS),--events $(EVENTS))

# The tests use real clocks, disks and processes. What fails beside the others, on a machine that may be busy, gets a second try
# by itself: who fails twice has a defect. The first failure stays above it, to be read.
test: tools lint
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder || { [ $$? -eq 1 ] && \
	  echo "What failed is tried once more, by itself. If it passes now, please report what is above." && \
	  $(BIN)/pytest --last-failed --last-failed-no-failures none; }

tools:
	@PATH="$$PATH:/usr/sbin:/sbin"; missing=; packages=; \
	for tool in $(TOOLS); do command -v $${tool%%:*} >/dev/null || \
	  { missing="$$missing $${tool%%:*}"; packages="$$packages $${tool##*:}"; }; done; \
	[ -z "$$missing" ] && exit 0; \
	case "$$packages" in *chromium*) packages="fonts-dejavu-core$$packages";; esac; \
	echo "The tests also use$$missing: apt-get install$$packages"; \
	[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo "Install them, or run this as root."; exit 1; }; \
	command -v prometheus >/dev/null || [ -e $(MASKED) ] || { mkdir -p $(dir $(MASKED)) && ln -s /dev/null $(MASKED); }; \
	apt-get update -qq; \
	for package in $$packages; do \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$package >/dev/null || \
	  echo "No package $$package here: the tests that use it will say so. (Ubuntu has chromium as a snap: snap install chromium)"; done

coverage: tools $(VENV)/.tested
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered

lint: $(VENV)/.tested
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.benched
	$(BIN)/python -m bench all

screenshots: tools $(VENV)/.tested
	BRIDGED_RENEW_SCREENSHOTS=1 $(BIN)/pytest --quiet tests/test_page_browser.py

clean:
	rm -rf $(VENV) .bench-peers .ci/artefacts .demo .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage build dist
	find bridged bench tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: what is newer than they are is installed again, and nothing else.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV) ..."
	@$(PIP) install --editable ".[cli]"
	@touch $@

$(VENV)/.benched: pyproject.toml $(VENV)/.installed
	@echo "Installing what the benchmarks' plots need into $(VENV) ..."
	@$(PIP) install --editable ".[cli,bench]"
	@touch $@

$(VENV)/.tested: pyproject.toml $(VENV)/.installed
	@echo "Installing what the tests need into $(VENV) ..."
	@$(PIP) install --upgrade "pip>=25.1"
	@$(PIP) install --group test --group lint
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "bridged needs Python 3.11 or later, and there is no '$(PYTHON)' here."; \
	  echo "  Debian, Ubuntu: apt install python3 python3-venv"; \
	  echo "  elsewhere:      make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "bridged needs Python 3.11 or later, and '$(PYTHON)' is $$($(PYTHON) -V)."; \
	  echo "  choose another one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$$($(PYTHON) -V) can't make virtual environments: its venv module is a package of its own here."; \
	  echo "  Debian, Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Making a virtual environment in $(VENV) ..."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
