# Everything happens inside the checkout: the environment, its caches and what tools write lie in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --constraint constraints.txt
export XDG_CACHE_HOME := $(CURDIR)/$(VENV)/cache
export PIP_CACHE_DIR := $(CURDIR)/$(VENV)/cache/pip
export HF_HOME := $(CURDIR)/$(VENV)/cache/huggingface
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/cache/matplotlib
export PIP_DISABLE_PIP_VERSION_CHECK := 1
.DELETE_ON_ERROR:
.PHONY: help demo test hosts quick check docs release-check format bench clean

help:  ## Say what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile

demo: $(VENV)/run.stamp  ## Prune the shipped model by every method and print the comparison (two minutes)
	@$(BIN)/maskopt demo

test: $(VENV)/dev.stamp  ## Run all tests
	$(BIN)/python -m pytest -n $(or $(WORKERS),2) --dist worksteal tests

hosts: $(VENV)/made.stamp  ## Test what needs llm-compressor, ModelOpt or lm-eval, each in an environment of its own
	@for host in llmcompressor modelopt eval; do \
		test -x $(VENV)/hosts/$$host/bin/python || $(PYTHON) -m venv $(VENV)/hosts/$$host || exit 1; \
		$(VENV)/hosts/$$host/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" --editable ".[$$host]" \
			pytest hypothesis || exit 1; \
		$(VENV)/hosts/$$host/bin/python -m pytest -o filterwarnings=ignore \
			$$(test $$host = eval && echo tests/cli/test_evaluate.py || echo tests/hosts) || exit 1; \
	done

quick: $(VENV)/dev.stamp  ## Run one case of every test, in a quarter of the time
	$(BIN)/python -m pytest -n $(or $(WORKERS),2) --quick tests

check: $(VENV)/dev.stamp docs  ## Lint, types, import rules, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks/*.py
	$(BIN)/lint-imports

docs: $(VENV)/dev.stamp  ## Build the documentation site, build/docs/index.html; warnings are errors
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --conf-dir docs --doctree-dir build/doctrees . build/docs

release-check: $(VENV)/dev.stamp  ## Build wheel and source distribution, check them, and run the wheel's demo elsewhere
	rm -rf build/dist $(VENV)/release
	$(BIN)/python -m build --outdir build/dist .
	$(BIN)/python -m twine check --strict build/dist/*
	$(PYTHON) -m venv $(VENV)/release
	cd $(VENV)/release && bin/python -m pip install --quiet --constraint $(CURDIR)/constraints.txt \
		"$$(echo $(CURDIR)/build/dist/*.whl)[hf]" && bin/maskopt doctor && bin/maskopt demo --json demo.json

format: $(VENV)/dev.stamp  ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The settings of the committed results.
comma := ,
FOLDERS = $(foreach model,$(MODELS) $(SMOLLM),$(firstword $(subst $(comma), ,$(model))))
JOINT := --weights keep,lsq,sparsegpt,admm,fista,alps,best
MASKS_STUDY := --solvers wanda,sparsefw,one-swap,continuation --tune sparsefw --sets per-row:0.5,per-row:0.6,2:4 \
	--samples 32 --seeds 0,1
WEIGHTS_STUDY := --name weights --only-models --solvers continuation $(JOINT) --propagate default,corrected --seeds 0,1 \
	--sets per-row:0.5,per-row:0.6,per-row:0.7,2:4,4:8 --samples 20 --characters 60000 --jobs 2
DEMO_STUDY := --name weights-demo --solvers continuation --weights lsq,admm,alps,fista,best --propagate default,corrected \
	--sets per-row:0.6,2:4 --samples 10 --characters 40000
SMOLLM_STUDY := --name smollm2 --only-models --solvers wanda --weights sparsegpt,alps,best,keep \
	--propagate default --tune sparsegpt --tune-once --sets per-row:0.5,per-row:0.6,2:4 --samples 32 --batch-size 2 \
	--validation 8 --characters 250000
ALLOCATION_STUDY := --methods best,wanda --sparsities 0.5,0.6,0.7,0.8 --characters 60000 --rules uniform,auto,owl,dlp
SMOLLM_ALLOCATION := --name allocation-smollm2 --only-models --methods best --sparsities 0.6 --rules uniform,auto --samples 32 \
	--batch-size 2 --characters 250000
SMOLLM_SHRINKING := --name shrinking-smollm2 --only-models --characters 100000 --losses 0.3/0,0.3/0.25 \
	--arms fasp,osscar,best:block
CORRECTION_STUDY := --patterns per-row:0.6,2:4 --characters 60000
RECOVERY_STUDY := --characters 60000
SHRINKING_STUDY := --characters 60000 --arms fasp:units,osscar:units,best:units,fasp:block,best:block,best:block:free
STARTS_STUDY := --name recovery-starts --only-models --samples 32 --characters 60000 --patterns per-row:0.6 \
	--methods wanda,sparsegpt,alps,best --recoveries none,block,model
SPARSITIES_STUDY := --name recovery-sparsities --only-models --samples 32 --characters 60000 \
	--patterns per-row:0.5,per-row:0.7,per-row:0.8 --recoveries none,block,model
WINDOWS_STUDY := --name recovery-windows --only-models --samples 16,64 --characters 60000 --patterns per-row:0.6 \
	--recoveries none,block,model $(if $(FOREIGN),--foreign $(FOREIGN))
RULES_STUDY := --name mask-rules --only-models --samples 32 --characters 60000 \
	--recoveries none,block:fixed,block,block:reselection,block:admm,block:drop-and-grow,block:frank-wolfe,block:bip,block:policy-gradient,block:gumbel,block:fixed:lora,ebft:0.0002,ebft:0.001,ebft:0.005,ebft:0.02,model:fixed,model:fixed:lora
# SMOLLM names the folder that benchmarks/make_smollm2.py makes, FOREIGN a text of another kind than MODELS' texts.
bench: $(VENV)/dev.stamp  ## Write benchmarks/results (LAYERS=, MODELS= and SMOLLM= add to them, see README)
	$(BIN)/python benchmarks/layers.py $(LAYERS)
	$(BIN)/python benchmarks/layers.py $(LAYERS) --name joint --solvers continuation $(JOINT)
	$(BIN)/python benchmarks/directions.py $(LAYERS)
	$(BIN)/python benchmarks/iteration.py
	$(BIN)/python benchmarks/synchronisations.py
	$(if $(LAYERS),$(BIN)/python benchmarks/bounds.py $(LAYERS) --rows 8 --inputs 96 0 --cuts 100)
	$(if $(LAYERS),$(BIN)/python benchmarks/exact.py $(LAYERS))
	$(BIN)/python benchmarks/false_claims.py --instances 50000 --jobs 2
	$(BIN)/python benchmarks/columns.py $(if $(LAYERS),--instances $(LAYERS))
	$(BIN)/python benchmarks/column_claims.py
	$(BIN)/python benchmarks/make_library.py
	$(BIN)/python benchmarks/perplexity.py $(MODELS) $(MASKS_STUDY)
	$(if $(MODELS),$(BIN)/python benchmarks/perplexity.py $(MODELS) $(WEIGHTS_STUDY))
	$(BIN)/python benchmarks/perplexity.py $(DEMO_STUDY)
	$(if $(SMOLLM),$(BIN)/python benchmarks/perplexity.py $(SMOLLM) $(SMOLLM_STUDY))
	$(BIN)/python benchmarks/allocation.py $(MODELS) $(ALLOCATION_STUDY)
	$(BIN)/python benchmarks/correction.py $(MODELS) $(CORRECTION_STUDY)
	$(BIN)/python benchmarks/recovery.py $(MODELS) $(RECOVERY_STUDY)
	$(if $(MODELS),$(BIN)/python benchmarks/recovery.py $(MODELS) $(RULES_STUDY))
	$(if $(MODELS),$(BIN)/python benchmarks/recovery.py $(MODELS) $(STARTS_STUDY))
	$(if $(MODELS),$(BIN)/python benchmarks/recovery.py $(MODELS) $(SPARSITIES_STUDY))
	$(if $(MODELS),$(BIN)/python benchmarks/recovery.py $(MODELS) $(WINDOWS_STUDY))
	$(if $(MODELS),$(BIN)/python benchmarks/recovery_ranks.py $(MODELS) --characters 60000)
	$(BIN)/python benchmarks/shrinking.py $(MODELS) $(SHRINKING_STUDY)
	$(BIN)/python benchmarks/speed.py $(FOLDERS)
	$(BIN)/python benchmarks/checkpointing.py $(FOLDERS)
	$(if $(SMOLLM),$(BIN)/python benchmarks/allocation.py $(SMOLLM) $(SMOLLM_ALLOCATION))
	$(if $(SMOLLM),$(BIN)/python benchmarks/shrinking.py $(SMOLLM) $(SMOLLM_SHRINKING))
	$(BIN)/python benchmarks/large_models.py $(SMOLLM)
	$(BIN)/python benchmarks/kills.py
	$(BIN)/python benchmarks/packing.py $(MODELS) $(SMOLLM)

clean:  ## Remove the environment and all caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/made.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "maskopt needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1); try make PYTHON=python3.12."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/run.stamp: $(VENV)/made.stamp pyproject.toml constraints.txt
	@echo "Installing maskopt and what it needs into $(VENV); PyTorch takes most of the time."
	$(PIP) --progress-bar on --editable '.[hf]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	@echo "Installing the development tools into $(VENV)."
	$(PIP) --editable '.[hf,mip,report,peft,torch-pruning,zstd,dev]'
	@touch $@
