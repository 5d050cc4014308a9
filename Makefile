# The workflow, a target a step. `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help install docs demo test fast slow lint mutants fuzz faults bench bench-gpu study lock newest wheel compile golden pretrain clean

PYTHON ?= $(firstword $(shell command -v python3.11) python3)
VENV := .venv
READY := $(VENV)/.ready
TORCH := torch==2.13.0
# A process a core and one more, for those that wait, of one thread each. The tests of a file stay together, since they
# share what they set up. Python keeps what it compiled, wherever a shell says that it must not: the asserts of all tests
# are compiled again in each process otherwise.
PROCESSES := $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )))
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -n $(PROCESSES) --maxprocesses 8 --dist loadfile \
  --no-loadscope-reorder
CLUSTER ?= manifests/cluster.example.yaml

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(READY) ## make the environment in .venv (done by itself where a target needs it)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), layerloop needs Python 3.11 or newer: name one, as in make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "making the environment in $(VENV) (once; a few minutes, about 3 GB)"
	@$(PYTHON) -m venv $(VENV)
# torch first and alone: a build that is already chosen is not replaced by what another package would pull in.
	@echo "1/2 torch"
	@$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt setuptools $(TORCH)
	@echo "2/2 layerloop and everything else"
	@$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-build-isolation \
	  --editable '.[policy,judge,evaluation,decompose,pipelines,demo,study,dev]'
	@touch $(READY)

# FRESH=1 starts again. IMAGES, JUDGE_URL, CAMPAIGN and ITERATIONS replace the demo's own.
demo: $(READY) ## run the whole pipeline on this machine and make a report; again: continue (FRESH=1: start again)
	@$(VENV)/bin/layerloop demo $(if $(FRESH),--fresh) $(if $(IMAGES),--images '$(IMAGES)') \
	  $(if $(JUDGE_URL),--judge-url '$(JUDGE_URL)') $(if $(CAMPAIGN),--campaign '$(CAMPAIGN)') \
	  $(if $(ITERATIONS),--iterations $(ITERATIONS))

test: $(READY) ## run all tests, lint and types among them
	@$(PYTEST)

fast: $(READY) ## run the fast half of the tests, for while you work
	@$(PYTEST) -q -m "fast and not slow"

slow: $(READY) ## run the long tests too, which `make test` leaves out
	@$(PYTEST) -m slow

lint: $(READY) ## only formatting, lint, types and the arrows between packages
	@$(VENV)/bin/python -m pytest tests/test_house.py

# PART=1/4 runs a quarter of them, ONLY=name one; what was caught is kept in build/mutants.json.
mutants: $(READY) ## check that the tests catch every deliberate fault of tests/mutants/faults.yaml; resumable
	@$(VENV)/bin/python tests/mutants $(if $(PART),--part $(PART)) $(if $(ONLY),--only $(ONLY)) $(if $(JOBS),--jobs $(JOBS))

# MINUTES=60 for each target, ONLY=tars for one; what failed is kept in build/fuzz.
fuzz: $(READY) ## look for inputs that are neither a result, a reject nor one line; make test has a slice of it
	@$(VENV)/bin/python tests/fuzz $(if $(MINUTES),--minutes $(MINUTES)) $(if $(ONLY),--only $(ONLY))

# PART=1/4 runs a quarter of them, ONLY='s3 update' those whose names begin so; what held is kept in build/faults.json.
faults: $(READY) ## kill every step at every change of its store, spoil its network, fill its disk; resumable, hours
	@$(VENV)/bin/python tests/faults $(if $(PART),--part $(PART)) $(if $(ONLY),--only '$(ONLY)')

bench: $(READY) ## measure; writes build/benchmarks.json
	@$(VENV)/bin/python -m pytest tests/benchmarks

# BENCH='--minutes 10 --only forward,update' measures more or less; what is measured is kept.
bench-gpu: $(READY) ## measure the model at real size on one GPU, random weights, six minutes; writes build/gpu.json
	@$(VENV)/bin/python tests/benchmarks/gpu $(BENCH)

study: $(READY) ## does it learn? campaigns on the tiny policy, about two hours, resumable; writes docs/RESULTS.md
	@$(VENV)/bin/layerloop study $(STUDY)

pretrain: $(READY) ## train the shipped tiny policy again (hours)
	@$(VENV)/bin/python -m layerloop.components.research.pretraining

# CLUSTER=mine.yaml compiles for your cluster; the committed packages are for the example.
compile: $(READY) ## write the packages in pipelines/compiled, after recipes, components or pipelines have changed
	@$(VENV)/bin/layerloop compile -o pipelines/compiled/train.yaml --cluster $(CLUSTER)
	@$(VENV)/bin/layerloop compile -o pipelines/compiled/train-resident.yaml --resident --cluster $(CLUSTER)
	@$(VENV)/bin/layerloop compile -o pipelines/compiled/evaluate.yaml --pipeline evaluate --cluster $(CLUSTER)

golden: $(READY) compile ## write the committed packages and the stored values of tests/invariant anew; look at their diff
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/invariant --golden -q
	@git --no-pager diff --stat -- pipelines/compiled tests/invariant

docs: $(READY) ## build the documentation's site in build/site; a link that leads nowhere stops it
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet && echo "built build/site: open build/site/index.html"

wheel: $(READY) ## build dist/*.whl, as the images install it
	@$(VENV)/bin/python -m build --wheel --no-isolation --outdir dist

lock: $(READY) ## write constraints.txt from the environment, after pyproject.toml has changed
	@{ sed '/^[^#]/,$$d' constraints.txt; \
	  $(VENV)/bin/python -m pip freeze --all --exclude-editable --exclude pip | sed 's/+cpu$$//'; } > build/constraints.txt
	@mv build/constraints.txt constraints.txt

# The fast tests, and those of what is driven by its private parts: diffusers, peft, kfp. Nothing in .venv changes.
newest: ## try the newest versions that pyproject.toml allows, in an environment of their own, build/newest
	@$(PYTHON) -m venv --clear build/newest
	@build/newest/bin/python -m pip install --quiet 'setuptools>=80,<90'
	@build/newest/bin/python -m pip install --quiet --no-build-isolation \
	  --editable '.[policy,judge,evaluation,decompose,pipelines,demo,study,dev]'
	@build/newest/bin/python -m pip freeze --all --exclude-editable --exclude pip | sed 's/+cpu$$//' > build/newest.txt
	@$(subst $(VENV),build/newest,$(PYTEST)) -q -m "fast and not slow"
	@$(subst $(VENV),build/newest,$(PYTEST)) -q tests/policy tests/update_lora tests/invariant tests/pipelines/test_local.py

clean: ## remove what was made, the environment and the demo's campaign aside
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
