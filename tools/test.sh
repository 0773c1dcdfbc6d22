#!/usr/bin/env bash
# Everything that must hold before a commit: lint, format, types, import contract, tests.
# Options go to pytest: bash tools/test.sh -m slow; bash tools/test.sh tests/unit/losses
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/env.sh dev
step() { printf '\n== %s\n' "$*"; "$@"; }
step ruff check .
step ruff format --check .
step lint-imports
step basedpyright
step python -m pytest -n 2 --dist loadfile "$@"
