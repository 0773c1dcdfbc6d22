#!/usr/bin/env bash
# Everything that must hold before a commit: lint, format, types, import contract, tests.
# --all runs the slow tests too, and installs the published weights and the package reasoning-gym that some of them read. Other options go to pytest: bash tools/test.sh tests/unit/losses
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --all ]; then
    shift
    set -- -m "slow or not slow" "$@"
    . tools/env.sh dev smollm2 reasoning-gym
else
    . tools/env.sh dev
fi
step() { printf '\n== %s\n' "$*"; "$@"; }
step ruff check .
step ruff format --check .
step lint-imports
step basedpyright
step python -m pytest -n 2 --dist loadfile "$@"
