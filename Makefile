# make reproduce   the whole pipeline at the quick profile -> runs/quick/{results.json,report.html}
# make test        the test suite
# Both make their own virtual environment first; VENV=DIR puts it elsewhere.

VENV ?= .venv
PYTHON ?= python3
OUT ?= runs/quick

.PHONY: reproduce test

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

reproduce: $(VENV)/ready
	$(VENV)/bin/python -m fgrlhf.reproduce --profile quick --seeds 1 --out $(OUT)

test: $(VENV)/ready
	$(VENV)/bin/python -m tests
