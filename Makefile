# Everything a person or CI does here, each by one name. Every target sets up what it needs first (`scripts/setup`).
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

# Without bytecode files every start of the platform compiles again what it imports, which takes 1 s; tests start it often.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

# What a checker has found out is kept between checkouts: what it knows of the cloud's SDK takes most of a minute to find out again.
CACHE := $(or $(CRUCIBLE_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/crucible)

# Tracked and new files alike, so that a file is checked before it is committed.
FILES = git ls-files --cached --others --exclude-standard

.PHONY: help
help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

DEMO_ := $(BIN)/crucible demo
DEMO_rabbitmq := $(BIN)/python -m tests.servers.demo
.PHONY: demo
demo: setup-run ## Set up, run a mixed batch and explain each outcome (BROKER=rabbitmq: through a cluster that loses a node)
	$(or $(DEMO_$(BROKER)),$(error BROKER=$(BROKER) is not known here: leave it out, or say BROKER=rabbitmq))

.PHONY: servers
servers: setup-run ## Run a RabbitMQ cluster and a Redis in the foreground, and print the settings that name them
	$(BIN)/python -m tests.servers

.PHONY: images
images: setup-run ## Build the images of services/images (NAMES="runner service" for some) and print what each is called
	@scripts/images $(NAMES)

.PHONY: cluster-tools cluster-up cluster-down cluster-status cluster-kubectl
# What it prints is for programs.
cluster-tools: setup-dev
	@scripts/cluster-tools >/dev/null

cluster-up: setup-dev ## Bring up a Kubernetes cluster of three nodes on this machine (CRUCIBLE_CLUSTER names it)
	$(BIN)/python -m tests.cluster up

cluster-down: setup-dev ## End it and leave nothing behind
	$(BIN)/python -m tests.cluster down

cluster-status: setup-dev ## Say how its nodes are
	$(BIN)/python -m tests.cluster status

cluster-kubectl: setup-dev ## Run kubectl against it: make cluster-kubectl ARGS='get pods -A'
	$(BIN)/python -m tests.cluster kubectl $(ARGS)

.PHONY: deploy deploy-down
deploy: setup-dev ## Put the platform on the cluster that is up, or that KUBECONFIG names; done again it brings it up to date (ARGS=--help)
	scripts/deploy up $(ARGS)

deploy-down: setup-dev ## Take it away; what it has stored stays (ARGS=--data: that too)
	scripts/deploy down $(ARGS)

# What it prints is for programs.
.PHONY: pulumi-engine
pulumi-engine:
	@scripts/pulumi-engine >/dev/null

.PHONY: preview
preview: setup-dev ## Show all that an environment consists of on AWS, without an account: make preview ENV=dev
	@$(BIN)/crucible-platform preview --stack $(or $(ENV),$(error name one: make preview ENV=dev))

.PHONY: test
test: lint test-unit test-infra test-integration test-cluster ## Set up and run every tier that exists, cheapest first

# Without the plugin of the other tier's API tests, which takes 1 s to load.
.PHONY: test-unit
test-unit: setup-dev ## Pure and in-process tests: no network, no server, under 10 s
	$(PYTEST) tests/unit -p no:schemathesis --numprocesses logical --maxprocesses 4 --junitxml=reports/unit.xml

# A tier of its own, since its SDK takes a second to load in each process.
.PHONY: test-infra
test-infra: setup-dev ## The infrastructure's programs under Pulumi's mocks, its policies and plans: no network, no server
	$(PYTEST) tests/infra -p no:schemathesis --numprocesses 2 --dist loadfile --junitxml=reports/infra.xml

.PHONY: test-integration
test-integration: setup-dev pulumi-engine ## Real PostgreSQL and real sandboxes, on loopback
	$(PYTEST) tests/integration --numprocesses 2 --junitxml=reports/integration.xml

.PHONY: test-cluster
test-cluster: cluster-tools ## Tests on a real Kubernetes cluster of three nodes, brought up for them; takes root
	$(PYTEST) tests/kubernetes --junitxml=reports/cluster.xml

.PHONY: test-storm
test-storm: cluster-tools ## 150 evaluations at once while a dispatcher, the leading monitor and a node are lost; 15,000 waiting
	CRUCIBLE_TEST_AT_ONCE=150 $(PYTEST) tests/kubernetes/test_storm.py -s

.PHONY: test-with-calico
test-with-calico: cluster-tools ## The tests of network isolation on a cluster with Calico, kind's where there is Docker; asks first (YES=1: does not)
	scripts/test-with-calico

.PHONY: bench
bench: setup-dev ## Measure latency and throughput against bare sandboxes on this machine
	$(BIN)/python -m benchmarks.run

.PHONY: bench-broker
bench-broker: setup-dev ## Measure publishing, consuming and the relay beside raw kombu on a real cluster of three
	$(BIN)/python -m benchmarks.broker

.PHONY: bench-cluster
bench-cluster: setup-dev ## Measure the platform beside bare Jobs, and gVisor beside runc, on one real cluster
	$(BIN)/python -m benchmarks.cluster

.PHONY: setup-run
setup-run:
	@scripts/setup run

.PHONY: setup-dev
setup-dev:
	@scripts/setup dev

LINTERS := lint-ruff lint-format lint-types lint-imports lint-yaml lint-shell lint-dockerfiles lint-workflows lint-compose lint-manifests lint-repository lint-docs lock-check
.PHONY: lint $(LINTERS)
lint: $(LINTERS) ## Every static check

lint-ruff: setup-dev
	$(BIN)/ruff check .

lint-format: setup-dev
	$(BIN)/ruff format --check .

lint-types: setup-dev
	$(BIN)/mypy --cache-dir $(CACHE)/mypy

lint-imports: setup-dev
	$(BIN)/lint-imports --cache-dir .import_linter_cache

lint-yaml: setup-dev
	$(FILES) -z -- '*.yaml' '*.yml' '.yamllint' | xargs -0 $(BIN)/yamllint --strict

lint-shell: setup-dev
	$(FILES) | scripts/shell-files | xargs $(BIN)/shellcheck

lint-dockerfiles: setup-dev
	$(FILES) -z -- '*Dockerfile' | xargs -0 $(BIN)/hadolint --config .hadolint.yaml

lint-workflows: setup-dev
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/zizmor --offline --quiet --no-progress --pedantic .github

lint-compose: setup-dev
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml

lint-manifests: setup-dev
	$(BIN)/python scripts/lint_manifests.py

lint-repository: setup-dev
	$(BIN)/python scripts/check_repository.py

lint-docs: setup-dev
	$(BIN)/crucible openapi --check
	$(BIN)/python -m crucible.reference --check
	$(BIN)/crucible-platform config-docs --check

lock-check: setup-dev ## Fail if requirements/ is not what pyproject.toml asks for
	scripts/lock --check

.PHONY: lock
lock: setup-dev ## Write requirements/ from pyproject.toml (UPGRADE=1 for the newest versions it allows)
	scripts/lock $(if $(UPGRADE),--upgrade)

.PHONY: openapi docs
openapi: setup-dev ## Write docs/openapi.json from the API, sorted, with its digest
	$(BIN)/crucible openapi --output docs/openapi.json

docs: openapi ## Write everything in docs/ that only repeats what the code says
	$(BIN)/python -m crucible.reference
	$(BIN)/crucible-platform config-docs

.PHONY: format
format: setup-dev ## Format the Python code and apply the linter's safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: clean
clean: ## Remove everything that git does not keep, .venv included
	git clean -fdX
