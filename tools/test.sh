#!/usr/bin/env bash
# Everything that must hold before a commit: lint, format, types, import contract, tests.
# --all runs the slow tests too. Other options go to pytest: bash tools/test.sh tests/unit/losses
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/env.sh dev
if [ "${1:-}" = --all ]; then
    shift
    set -- -m "slow or not slow" "$@"
fi
step() { printf '\n== %s\n' "$*"; "$@"; }
step ruff check .
step ruff format --check .
step lint-imports
step basedpyright
step python -m pytest -n 2 --dist loadfile "$@"
