# make reproduce   the whole pipeline at the quick profile -> runs/quick/{results.json,report.html}
# make model       SmolLM2-135M-Instruct, a real pretrained LLaMA -> models/
# make test        the test suite
# Each makes a virtual environment first; VENV=DIR puts it elsewhere.

VENV ?= .venv
PYTHON ?= python3
OUT ?= runs/quick

.PHONY: reproduce model test

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

reproduce: $(VENV)/ready
	$(VENV)/bin/python -m fgrlhf.reproduce --profile quick --seeds 1 --out $(OUT)

model: $(VENV)/ready
	$(VENV)/bin/python -m fgrlhf.checkpoint fetch-smollm2 --out models

test: $(VENV)/ready
	$(VENV)/bin/python -m tests
