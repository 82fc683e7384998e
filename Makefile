# make reproduce   the whole pipeline at the quick profile -> runs/quick/{results.json,report.html}
#                  PROFILE=full SEEDS=4 WORKERS=2: another profile (-> runs/full/), seeds 0 to 3,
#                  two stages at a time (otherwise as many as cores); OUT=DIR: another folder
# make real DATA=DIR   the method on people's edits of news summaries -> runs/real/
#                  PROMPT=lead-60: the first 60 words as prompts (-> runs/real-lead-60/), or article
# make model       SmolLM2-135M-Instruct, a real pretrained LLaMA -> models/
# make gpu         checks and measures everything on a GPU, in 8 minutes -> runs/gpu-TIME/gpu.md
# make test        the test suite
# Each but `make gpu` makes a virtual environment first; VENV=DIR puts it elsewhere. `make gpu` needs
# no network: it uses PYTHON, which must have the packages and a torch for the GPU.

VENV ?= .venv
PYTHON ?= python3
PROFILE = quick
SEEDS = 1
WORKERS =
PROMPT =
OUT ?= runs/$(PROFILE)

MINUTES ?= 8

.PHONY: reproduce real model gpu test

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

reproduce: $(VENV)/ready
	$(VENV)/bin/python -m fgrlhf.reproduce --profile $(PROFILE) --seeds $(SEEDS) --out "$(OUT)" \
		$(if $(WORKERS),--workers $(WORKERS))

real: $(VENV)/ready
	$(VENV)/bin/python -m fgrlhf.reproduce --profile real $(if $(DATA),--data "$(DATA)") \
		$(if $(PROMPT),--prompt $(PROMPT)) --out runs/real$(if $(PROMPT),-$(PROMPT))

model: $(VENV)/ready
	$(VENV)/bin/python -m fgrlhf.checkpoint fetch-smollm2 --out models

gpu:
	$(PYTHON) -m fgrlhf.checks gpu --minutes $(MINUTES) --out runs/gpu-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/ready
	$(VENV)/bin/python -m tests
