# SPDX-License-Identifier: Apache-2.0
# `make` prints the targets. Everything lives in .venv; system packages come by apt when root.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCHMARKS := aggregation robust_rules mqtt_endpoint agent_idle first_line package log_throughput \
	dashboard deployed_round fleet simulation

help: ## print the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

system:
	@need=""; \
	command -v mosquitto >/dev/null || test -x /usr/sbin/mosquitto || need="$$need mosquitto"; \
	test -d /usr/share/datasets/fashion-mnist || need="$$need dataset-fashion-mnist"; \
	command -v chromium >/dev/null || command -v google-chrome >/dev/null || need="$$need chromium"; \
	command -v podman >/dev/null || need="$$need podman"; \
	test -x /bin/busybox || need="$$need busybox-static"; \
	command -v openssl >/dev/null || need="$$need openssl"; \
	command -v curl >/dev/null || need="$$need curl"; \
	if [ -n "$$need" ]; then \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq $$need; \
	  else echo "please run: sudo apt-get install$$need"; exit 1; fi; \
	fi

demo: $(STAMP) ## a broker, four agents, a job, ten federated rounds on real data
	$(BIN)/python examples/demo.py

test: $(STAMP) system ## set up and run the tests
	$(BIN)/python -m pytest -q

check: $(STAMP) ## format, lint, types, generated code, import table, docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict protocol/fedml_protocol agent/fedml_agent broker/fedml_broker fedml
	$(BIN)/python protocol/generate.py --check
	$(BIN)/python docs/generate.py --check
	$(BIN)/python -m pytest -q tests/test_imports.py tests/test_docs.py

faults: $(STAMP) system ## the long fault tests: minutes without a broker, 400 tasks under fire
	$(BIN)/python -m pytest -q -m long tests/faults

bench: $(STAMP) system ## measure against the targets, short; docs/benchmarks.md
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py --quick || exit 1; echo; done

reproduce: $(STAMP) system ## published numbers beside ours, hours; docs/reproduced.md
	-$(BIN)/pip install -q -c constraints.txt dp-accounting
	$(BIN)/python -m benchmarks.reproduce

format: $(STAMP) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: help demo test check faults bench reproduce format system
