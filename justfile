# Everyday commands; `just` lists them.

default:
    @just --list

# install the project with everything a developer needs
install:
    pip install -e ".[dev]"

# the default tests: under ten minutes on two cores
test *args:
    python -m pytest {{args}}

# everything that runs on this machine
test-all:
    python -m pytest -m "not gpu and not parity"

# lint, format check, types
check:
    ruff check .
    ruff format --check .
    mypy

# rewrite files in the project's format
format:
    ruff check --fix .
    ruff format .

# one benchmark, alone on the machine: just bench experts
bench name:
    python benchmarks/{{name}}.py
