# `make help` lists what there is. Everything runs in .venv, which the first target that needs it sets up.
PROFILE ?= cpu
PYTHON ?= python3
VENV := .venv
LOCK := $(if $(filter gpu,$(PROFILE)),requirements/gpu.txt,requirements/cpu.txt)
READY := $(VENV)/.ready-$(notdir $(basename $(LOCK)))
TEAM := $(VENV)/.ready-team
# llama.cpp's library is built here for quantising only: a portable build, without its image tools
export CMAKE_ARGS ?= -DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF
export PATH := $(abspath $(VENV))/bin:$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1

.DEFAULT_GOAL := help
.PHONY: help setup team team-up team-down demo repro test lint browser postgres doctor review feedback chat serve ui compare promote profile lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## virtual environment with the pinned packages of PROFILE (cpu)

$(READY): $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $(LOCK)
	@touch $@

team: $(TEAM)  ## beside those, what several machines or people need: Ray, S3, PostgreSQL, a router

$(TEAM): requirements/team.txt $(READY)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/team.txt
	@touch $@

team-up: $(TEAM)  ## an MLflow server on PostgreSQL for several people, on 127.0.0.1:5001
	@python -m stages.team up

team-down: $(TEAM)  ## stop that server; its data stay
	@python -m stages.team down

demo: repro  ## the whole pipeline on the bundled docs, and its scores
	@python -m stages.summary

repro: $(READY)  ## dvc repro: what changed since the last run
	dvc repro

test: $(TEAM) browser postgres  ## the tests, a real run of the pipeline included
	python -m pytest -n 2 --no-loadscope-reorder

browser:  ## a Chromium for the tests of the review page, where there is none
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
		as_root=$$([ "$$(id -u)" = 0 ] || echo "sudo -n"); \
		$$as_root apt-get update -qq && $$as_root apt-get install -y -qq --no-install-recommends chromium >/dev/null || { \
		echo "make browser: apt-get could not install chromium; install Chromium or Chrome so that chromium or google-chrome is on the PATH" >&2; exit 1; }; }

# for the length of the installation, Debian is told to make and start no database of its own
NO_CLUSTER := /etc/postgresql-common/createcluster.d/docsmith.conf
postgres:  ## Debian's PostgreSQL for team-up, where there is none
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || { \
		as_root=$$([ "$$(id -u)" = 0 ] || echo "sudo -n"); \
		$$as_root sh -ec 'trap "rm -f $(NO_CLUSTER)" EXIT; mkdir -p $(dir $(NO_CLUSTER)); echo create_main_cluster = false > $(NO_CLUSTER); \
		apt-get update -qq; DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql >/dev/null' || { \
		echo "make postgres: apt-get could not install postgresql; install PostgreSQL so that initdb is in /usr/lib/postgresql/<version>/bin" >&2; exit 1; }; }

lint: $(READY)  ## ruff, rules and format, and mypy over the stages
	ruff check .
	ruff format --check .
	mypy stages

doctor: $(READY)  ## what this machine can run, and which profile fits
	@python -m stages.doctor

review: $(READY)  ## accept, edit and reject pairs on 127.0.0.1:5002
	@python -m stages.review

feedback: $(READY)  ## what users said of answers, for make review and as gold candidates
	@python -m stages.feedback

chat: $(READY)  ## talk to the model in the terminal
	@python -m stages.chat

serve: $(READY)  ## the chat page, POST /chat and /v1 on 127.0.0.1:5000
	@python -m stages.serve

ui: $(READY)  ## MLflow's pages on 127.0.0.1:5001
	mlflow ui --backend-store-uri sqlite:///models/mlflow.db --host 127.0.0.1 --port 5001

compare: $(READY)  ## the report with what this branch changes, in reports/pull-request.md
	@python -m stages.compare --against $(or $(AGAINST),origin/main)

promote: $(READY)  ## register the model; champion if the numbers support it
	@python -m stages.promote

profile: $(READY)  ## write the values of PROFILE=cpu or PROFILE=gpu into params.yaml
	@python -m stages.profile $(PROFILE)

UV_COMPILE := $(VENV)/bin/uv pip compile --quiet --upgrade --no-annotate --no-header --no-emit-index-url \
	--python-version 3.11 pyproject.toml
lock: $(READY)  ## pin the newest packages that fit together, for both profiles
	$(VENV)/bin/python -m pip install --quiet uv
	$(UV_COMPILE) --extra cpu --extra dev --override requirements/leave-out-cpu.txt $(foreach folder,$(PIP_FIND_LINKS),--find-links $(folder)) --output-file requirements/cpu.txt
	sed -i 's/^torch==\(.*\)+cpu$$/torch==\1/' requirements/cpu.txt
	$(UV_COMPILE) --extra team --extra team-dev --constraint requirements/cpu.txt --override requirements/leave-out-cpu.txt --override requirements/override-team.txt --output-file requirements/team.tmp
	grep -vxFf requirements/cpu.txt requirements/team.tmp | grep -v '^torch==' > requirements/team.txt; rm requirements/team.tmp
	$(UV_COMPILE) --extra gpu --extra dev --override requirements/leave-out-gpu.txt --python-platform x86_64-unknown-linux-gnu --output-file requirements/gpu.txt

clean:  ## remove the virtual environment and what the stages wrote; what people wrote and DVC's cache stay
	@git clean -ffdXq --exclude='!/data/feedback.sqlite*' -- $(VENV) data models reports/data_docs
