#!/usr/bin/env bash
# Everything that is to be measured on an accelerator, as one page and in under nine minutes; for the python
# that is on the PATH, with jax for that device. bash tools/device_day.sh PAGE; options go to tools/bench/device_day.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
page=${1:-runs/device_day.md}
if [ $# -gt 0 ]; then shift; fi
mkdir -p "$(dirname "$page")"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python tools/bench/device_day.py --out "$page" "$@"
{
    printf '\n## Whole runs of PPO on CartPole in one program\n\n'
    python tools/bench/bench_rl.py --rows ppo --seeds ${DEVICE_DAY_SEEDS:-1 4 16 64} --steps "${DEVICE_DAY_STEPS:-50000}" --repeats 1
} >>"$page"
