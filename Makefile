# Every verb makes its own .venv and installs what it needs: Python 3.10+ and git are enough.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# A file of tests is one process: those that follow find its kernels compiled.
TESTS = $(RUN) -m pytest -n 2 --dist loadfile

# vLLM's own environment: it pins numba and torch, and is large.
VLLM = .venv-vllm
# Ray's, with vLLM: it is larger.
CLUSTER = .venv-cluster

.PHONY: help bench test test-all test-vllm test-cluster pages explorer report check format readme clean

help:  ## this list (the default)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'All take PYTHON=python3.12 and VENV=folder; ARGS goes to the command that is run.'

bench: $(VENV)/bench.installed  ## gate, timings, table: within two minutes (ARGS="--full" for all)
	$(RUN) -m benchmarks $(ARGS)

test: $(VENV)/test.installed  ## the suite without its slow tests, minutes (ARGS="-k lora" for a part)
	$(TESTS) -m "not browser and not compiles and not oracle" $(ARGS)

test-all: $(VENV)/test.installed  ## the whole suite, and its ten slowest tests
	$(TESTS) --hypothesis-profile=thorough --durations=10 $(ARGS)

test-vllm: $(VLLM)/vllm.installed  ## vLLM's real engine on sgmv: minutes, 3 GB, Python 3.11+ (SGMV_TRAFFIC_SECONDS=600: long)
	$(VLLM)/bin/python -m pytest -q -s tests/vllm tests/compat/vllm/test_packed.py $(ARGS)

test-cluster: $(CLUSTER)/ray.installed  ## Ray: campaigns on two nodes, vLLM in two replicas: minutes, 4 GB, Python 3.11+
	$(CLUSTER)/bin/python -m pytest -q tests/cluster $(ARGS)

pages: $(VENV)/test.installed  ## each block and command of README and docs/, in fresh environments
	$(RUN) -m pytest -q -n 2 --dist worksteal tests/docs/fresh_pages.py $(ARGS)

explorer: $(VENV)/peft.installed  ## a page that shows what a GPU would do with a batch (ARGS=--no-open)
	$(RUN) -m sgmv explorer $(ARGS)

report: $(VENV)/bench.installed  ## a page of the committed benchmark records (ARGS="--records FOLDER" for yours)
	$(RUN) -m benchmarks report $(ARGS)

check: $(VENV)/dev.installed  ## linter, formatter, types, README against its records, and that a wheel holds no more than it should
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m benchmarks pages --check
	rm -rf $(VENV)/wheel
	$(RUN) -m build --quiet --wheel --outdir $(VENV)/wheel
	$(RUN) -c "import glob, zipfile as z; [wheel] = glob.glob('$(VENV)/wheel/*.whl'); \
	  found = {name.split('/')[0] for name in z.ZipFile(wheel).namelist()}; \
	  assert {n for n in found if not n.endswith('.dist-info')} == {'sgmv', 'sgmv_vllm'}, found"

format: $(VENV)/dev.installed  ## what the linter and the formatter can mend themselves
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

readme: $(VENV)/bench.installed  ## tables and figures of the README, from the committed records
	$(RUN) -m benchmarks pages

$(VENV)/%.installed: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

# torchvision and its kin come with vLLM as builds for GPUs; text models need none of them.
$(VLLM)/vllm.installed: EXTRAS = vllm,test
$(CLUSTER)/ray.installed: EXTRAS = ray,vllm,test
$(VLLM)/vllm.installed $(CLUSTER)/ray.installed: pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	$(@D)/bin/python -c 'import torchvision' 2>/dev/null || $(@D)/bin/python -m pip uninstall \
	  --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:  ## remove .venv, bench-out and what was built
	rm -rf $(VENV) $(VLLM) $(CLUSTER) bench-out build dist *.egg-info
