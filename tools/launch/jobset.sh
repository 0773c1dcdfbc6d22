#!/usr/bin/env bash
# What each pod of tools/launch/jobset.yaml runs: one process of a stage, which finds the others by the names that
# JobSet gives its pods. Kubernetes sends SIGTERM when it takes a node back; the stage ends the step under way,
# saves, and exits with status 75, "not finished", at which the JobSet starts all pods again. Any other status
# but 0 is a mistake that a second start would not mend.
set -euo pipefail

: "${JOBSET_NAME:?set by tools/launch/jobset.yaml}" "${REPLICATED_JOB_NAME:?}" "${PODS:?}"
: "${JOB_COMPLETION_INDEX:?set by Kubernetes for Indexed jobs}"

hosts=()
if [ "$PODS" -gt 1 ]; then
    # Pod 0 of job 0, by the name that the JobSet's headless service has for it.
    first="$JOBSET_NAME-$REPLICATED_JOB_NAME-0-0.$JOBSET_NAME"
    hosts=(--coordinator "$first:${PORT:-8476},$PODS,$JOB_COMPLETION_INDEX")
fi

# exec: the signal must reach the stage and not a shell.
exec rlhf "$@" ${hosts[@]+"${hosts[@]}"} --resume auto
