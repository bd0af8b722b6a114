# Every target sets the project up first (scripts/setup.sh; a second time it takes no time).
.DEFAULT_GOAL := help
.PHONY: help setup demo demo_all losses pipeline tune plan chaos scale worker kd proc answer qat test test_long lint report bench

PYTHON := .venv/bin/python
# Settings for a teacher on the CPU and for a quiet local Ray; a real cluster sets its own.
export VLLM_LOGGING_LEVEL ?= ERROR
export VLLM_NO_USAGE_STATS ?= 1
export RAY_AUTH_MODE ?= disabled
export WANDB_MODE ?= offline
export HF_HUB_OFFLINE ?= 1

help: ## this list
	@grep -hE '^[a-z_ ]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## make .venv with everything in it
	@scripts/setup.sh

demo: setup ## distil the demo student from the live demo teacher, judge it, write the report (about 10 minutes on 2 cores)
	@scripts/demo.sh

demo_all: setup ## the demo with every loss on (about 15 minutes on 2 cores)
	@scripts/demo.sh all

losses: setup ## what every loss does, alone: bench/losses.md
	@$(PYTHON) scripts/loss_table.py

pipeline: setup ## kd, process, answer, INT8: trained, exported, served, judged (about 20 minutes on 2 cores)
	@scripts/pipeline.sh

tune: setup ## a sweep of 16 trials over the demo, on one pass of the teacher (about an hour on 2 cores)
	@$(PYTHON) -m raykd.tune --config configs/tune_demo.yaml

plan: setup ## what every recipe in configs/ would take, on 1, 8 and 64 GPUs
	@$(PYTHON) scripts/plan.py

worker kd proc answer qat: setup ## one stage (scripts/stage.sh): make kd ARGS="data.prompts=…"; SIZE=demo: on 2 cores
	@SIZE=$(SIZE) scripts/stage.sh $@ $(ARGS)

test: setup lint ## ruff, pyright, pytest in two processes (tests/conftest.py says which runs what)
	@$(PYTHON) -m pytest -n 2 -m "not long"

chaos: setup ## runs that lose workers, teachers, nodes, their driver: bench/chaos.json (half an hour): make chaos ARGS="--seed 3"
	@$(PYTHON) scripts/chaos.py $(ARGS)

scale: setup ## 1 to 16 simulated teachers, 1 to 8 workers: bench/scale.json (half an hour on 2 cores): make scale ARGS=--quick
	@$(PYTHON) scripts/bench_scale.py $(ARGS)

test_long: setup ## what takes minutes: a sweep that is killed and goes on, crashes in a run on a mixture
	@$(PYTHON) -m pytest -m long

lint: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/pyright

report: setup ## write the report of a run again: make report CONFIG="configs/demo.yaml run.name=demo"
	@$(PYTHON) -m raykd.evaluate --report-only --config $(or $(CONFIG),configs/demo.yaml)

bench: setup ## all benchmarks; figures in bench/*.json
	@$(PYTHON) scripts/bench_head.py
	@$(PYTHON) scripts/bench_teacher.py
	@$(PYTHON) scripts/bench_pipeline.py
	@$(PYTHON) scripts/bench_int8.py
