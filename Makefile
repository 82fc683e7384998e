# make reproduce   the whole pipeline at the quick profile -> runs/quick/{results.json,report.html}
#                  PROFILE=full SEEDS=4 WORKERS=2: another profile (-> runs/full/), seeds 0 to 3,
#                  two stages at a time (otherwise as many as cores); OUT=DIR: another folder
# make real DATA=DIR   the method on people's edits of news summaries -> runs/real/
# make model       SmolLM2-135M-Instruct, a real pretrained LLaMA -> models/
# make test        the test suite
# Each makes a virtual environment first; VENV=DIR puts it elsewhere.

VENV ?= .venv
PYTHON ?= python3
PROFILE = quick
SEEDS = 1
WORKERS =
OUT ?= runs/$(PROFILE)

.PHONY: reproduce real model test

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

reproduce: $(VENV)/ready
	$(VENV)/bin/python -m fgrlhf.reproduce --profile $(PROFILE) --seeds $(SEEDS) --out "$(OUT)" \
		$(if $(WORKERS),--workers $(WORKERS))

real: $(VENV)/ready
	$(VENV)/bin/python -m fgrlhf.reproduce --profile real $(if $(DATA),--data "$(DATA)") --out runs/real

model: $(VENV)/ready
	$(VENV)/bin/python -m fgrlhf.checkpoint fetch-smollm2 --out models

test: $(VENV)/ready
	$(VENV)/bin/python -m tests
