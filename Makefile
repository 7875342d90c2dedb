# The targets make an environment of their own, .venv, the first time (they need python3 >= 3.10 with venv).
# PYTHON=/path/to/python uses an existing environment instead, and leaves its torch alone.
# ARGS= is passed on, for instance: make demo ARGS=--all, make test ARGS="-k linear -x".

PYTHON ?=
ARGS ?=

in_environment = python3 .ci/environment.py --python "$(PYTHON)"

.DEFAULT_GOAL := help
.PHONY: test demo bench lint clean help

test:  ## run the tests (on a machine without a GPU too)
	@$(in_environment) dev pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile $(ARGS)

demo:  ## fine-tune BERT on movie reviews: fastlora, PEFT and full fine-tuning
	@$(in_environment) demo fastlora.demo $(ARGS)

bench:  ## run the benchmarks
	@$(in_environment) dev pytest benchmarks $(ARGS)

lint:  ## check style, formatting and types
	@$(in_environment) dev ruff check .
	@$(in_environment) dev ruff format --check .
	@$(in_environment) dev mypy

clean:  ## remove .venv and what was built; .cache keeps what was downloaded
	rm -rf .venv build dist demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -rf *.egg-info
	find . -name '.venv*' -prune -o -name __pycache__ -prune -exec rm -rf {} +

help:  ## show this list
	@sed -n 's/^\([a-z]*\):  ## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST)
	@echo 'With PYTHON=/path/to/python: in that environment. With ARGS="...": passed on.'
