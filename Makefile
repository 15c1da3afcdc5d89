# Two commands do all the set-up themselves: `make demo` and `make test`.
# They make .venv on first use; `make test PYTHON=/path/to/python` uses an environment of your own as it is.

VENV := .venv
TRITON := 3.7.1
JOBS ?= 2
ifdef PYTHON
  PY := $(PYTHON)
  READY :=
else
  PY := $(VENV)/bin/python
  READY := $(VENV)/.ready
endif
# On a machine whose own python3 sees a GPU through torch, the GPU targets use that one.
GPU_PY = $(if $(PYTHON),$(PYTHON),$(shell python3 -c "import torch, triton; assert torch.cuda.is_available()" 2>/dev/null && echo python3 || echo $(VENV)/bin/python))
GPU_READY = $(if $(filter $(VENV)/bin/python,$(GPU_PY)),$(READY),)

.PHONY: help demo test test-gpu bench lint format accept gpu-status clean

help:            ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

$(VENV)/.ready: requirements-dev.txt
	@python3 -c 'import sys; sys.exit("Python 3.10 or newer is needed; python3 is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	@echo "== making $(VENV) (once; several minutes where torch must be downloaded)"
	@python3 -m venv $(VENV) || (echo "python3 -m venv failed: install the venv module (Debian, Ubuntu: apt-get install python3-venv)"; exit 1)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --progress-bar on -r requirements-dev.txt
	@$(VENV)/bin/python -c "import triton" 2>/dev/null || $(VENV)/bin/python -m pip install --progress-bar on triton==$(TRITON)
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY)   ## train a small language model through torch.ops.tt.* and through plain torch
	$(PY) examples/train_lm.py

test: $(READY)   ## the whole CPU suite
	$(PY) -m pytest -n $(JOBS) --dist worksteal tests

test-gpu: ## every op on this machine's GPU, going on where a run was cut off; writes tests/gpu_record.json
	@$(if $(GPU_READY),$(MAKE) --no-print-directory $(GPU_READY))
	$(GPU_PY) -m torch_triton_ops.testing --device cuda --jobs $(shell nproc) --resume .gpu_parts --record tests/gpu_record.json

bench: ## every op against its peers; writes bench/results/
	@$(if $(GPU_READY),$(MAKE) --no-print-directory $(GPU_READY))
	$(GPU_PY) -m bench.run --plot

gpu-status: $(READY) ## ops whose kernel, launcher or launch.py changed since their last pass on a GPU
	@$(PY) -m torch_triton_ops.testing --status tests/gpu_record.json

lint: $(READY)   ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY) ## let ruff format and fix
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

accept: $(READY) ## accept changed golden graphs; look at the diff
	EXPECTTEST_ACCEPT=1 $(PY) -m pytest tests/test_graphs.py

clean:           ## remove what make made
	rm -rf $(VENV) build dist *.egg-info demo_out .gpu_parts
