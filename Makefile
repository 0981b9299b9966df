# Every command makes the environment in .venv itself when it is missing or pyproject.toml has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The stamp names the folder that it was made for: in a copied or moved checkout, .venv would still run the old one.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint environment

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(STAMP) ## meta-train on the embedded digits, then adapt online; leaves ckpt.pt
	$(BIN)/python pretrain/meta_train.py model=digits_vit
	$(BIN)/python adapt/online.py method=source model=digits_vit
	$(BIN)/python adapt/online.py --policy ckpt.pt model=digits_vit
	@echo "See it: $(BIN)/tensorboard --logdir runs"

test: $(STAMP) ## the quick tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(STAMP) ## the slow tests
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal

lint: $(STAMP) ## style, types, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

environment: $(STAMP) ## only .venv

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("metaopt needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet 'torch>=2.14' torchvision
	$(BIN)/python -m pip install --quiet --editable '.[test,dev]'
	@printf '%s\n' '$(CURDIR)' >$@
