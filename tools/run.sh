#!/usr/bin/env bash
# From a fresh machine to trained models: makes .venv, then runs experiments/pipelines/rlhf.py.
# Every option is passed on: bash tools/run.sh --seeds 3 --out runs/mine
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/env.sh run
exec python experiments/pipelines/rlhf.py "$@"
