# make reproduce   the whole pipeline at the quick profile -> runs/quick/{results.json,report.html}
# make real DATA=DIR   the method on people's edits of news summaries -> runs/real/
# make model       SmolLM2-135M-Instruct, a real pretrained LLaMA -> models/
# make test        the test suite
# Each makes a virtual environment first; VENV=DIR puts it elsewhere.

VENV ?= .venv
PYTHON ?= python3
OUT ?= runs/quick

.PHONY: reproduce real model test

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

reproduce: $(VENV)/ready
	$(VENV)/bin/python -m fgrlhf.reproduce --profile quick --seeds 1 --out $(OUT)

real: $(VENV)/ready
	$(VENV)/bin/python -m fgrlhf.reproduce --profile real $(if $(DATA),--data "$(DATA)") --out runs/real

model: $(VENV)/ready
	$(VENV)/bin/python -m fgrlhf.checkpoint fetch-smollm2 --out models

test: $(VENV)/ready
	$(VENV)/bin/python -m tests
