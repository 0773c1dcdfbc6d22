#!/usr/bin/env bash
# From a fresh machine to trained models: makes .venv, then runs experiments/pipelines/rlhf.py, or with the
# word smollm2 experiments/pipelines/smollm2.py, which trains published weights (98 MB, installed on request
# as is reasoning-gym, a part of which is compiled on installation).
# Every option is passed on: bash tools/run.sh --seeds 3 --out runs/mine; bash tools/run.sh smollm2 --steps 5
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = smollm2 ]; then
    shift
    . tools/env.sh run smollm2 reasoning-gym
    exec python experiments/pipelines/smollm2.py "$@"
fi
. tools/env.sh run
exec python experiments/pipelines/rlhf.py "$@"
