# make run                      the whole pipeline on the built-in images
# make run DATA=path/to/coco    the same on your own COCO folder
# make test                     the tests;  make test-all  the long ones, too
# make settings-page            docs/settings.md anew, after a change of the settings
PYTHON ?= python3
VENV ?= .venv
STORE ?= store
ARGS ?=
DATA ?=

.PHONY: install run test test-all lint settings-page clean

run: install
	$(VENV)/bin/detr pipeline --store $(STORE) $(if $(DATA),data.path=$(DATA),--config configs/sample.yaml) $(ARGS)

test: install lint
	$(VENV)/bin/python -m pytest $(ARGS)

test-all: install lint
	$(VENV)/bin/python -m pytest -m "long or not long" $(ARGS)

lint: install
	$(VENV)/bin/ruff check .

settings-page: install
	$(VENV)/bin/python -m pipelines.settings_page

install: $(VENV)/.installed

# Again only when what is to be installed changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(STORE)
