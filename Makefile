# Each target does its own set-up, on any machine with Python 3.10 or later: a virtual environment in .venv with the
# versions of requirements/constraints.txt. The second run starts at once.
#
# On Linux, PyPI's torch brings several GB of CUDA packages along, so the CPU build is taken where its index answers.
# For the CUDA build: make demo CPU_INDEX=

PYTHON ?= python3
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?= -n 2
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo shapes-table shapes-adversarial test quality style setup clean

demo: $(READY)
	@$(VENV)/bin/python examples/shapes/demo.py

shapes-table: $(READY)
	@$(VENV)/bin/python examples/shapes/table.py

shapes-adversarial: $(READY)
	@$(VENV)/bin/python examples/shapes/adversarial.py

# One thread for each worker: two tests that both take every core are slower than either alone.
test: $(READY)
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/python -m pytest $(PYTEST_ARGS)

quality: $(READY)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

style: $(READY)
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

setup: $(READY)

clean:
	@rm -rf $(VENV) build demo shapes-table shapes-adversarial .pytest_cache .ruff_cache src/*.egg-info

$(READY): setup.cfg setup.py pyproject.toml requirements/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.10 or later is needed, this is %d.%d: choose one with make PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	@echo "Setting up $(VENV) (some minutes the first time)"
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@$(PYTHON) -c 'import urllib.request as r; r.urlopen("$(CPU_INDEX)/torch/", timeout=5)' 2>/dev/null \
	  && extra='--extra-index-url $(CPU_INDEX)' || extra=; \
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(VENV)/bin/pip install -qq $$extra -c requirements/constraints.txt -e '.[train,eval,dev]'
	@touch $@
