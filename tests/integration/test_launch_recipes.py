"""The launch recipes: their bash runs, against stand-ins of the programs that it calls."""

import os
import pathlib
import subprocess

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "tools" / "launch"


@pytest.fixture
def call(tmp_path):
    """Runs a script; what it calls is a line each in the log, and `rlhf` ends with the status given."""
    log = tmp_path / "log"
    stands_in = '#!/usr/bin/env bash\necho "$(basename "$0") $*" >>"$LOG"\n'
    for name, more in {
        "srun": 'while [[ "$1" == --* ]]; do shift; done\n"$@"\n',
        "scontrol": "",
        "rlhf": 'exit "$STATUS"\n',
    }.items():
        (tmp_path / name).write_text(stands_in + more)
        (tmp_path / name).chmod(0o755)

    def run(script, *words, status=0, **variables):
        log.write_text("")
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = {"PATH": path, "LOG": str(log), "STATUS": str(status), **variables}
        command = ["bash", str(LAUNCH / script), *words]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return ended, log.read_text().splitlines()

    return run


@pytest.mark.parametrize(("status", "ends_with", "again"), [(0, 0, False), (75, 0, True), (2, 2, False)])
def test_slurm_queues_again_what_is_not_finished_and_nothing_else(call, status, ends_with, again):
    words = ("grpo", "--out", "/a folder", "--steps", "3")
    ended, calls = call("slurm.sh", *words, status=status, SLURM_JOB_ID="17", SLURM_NNODES="4")
    assert ended.returncode == ends_with, ended.stderr
    assert "rlhf grpo --out /a folder --steps 3 --coordinator auto --resume auto" in calls
    assert ("scontrol requeue 17" in calls) == again


def test_slurm_on_one_node_names_no_hosts_and_gives_up_at_last(call):
    _, calls = call("slurm.sh", "sft", "--out", "x", SLURM_JOB_ID="17")
    assert calls[-1] == "rlhf sft --out x --resume auto"
    restarts = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "3", "MAX_RESTARTS": "3"}
    ended, calls = call("slurm.sh", "sft", "--out", "x", status=75, **restarts)
    assert ended.returncode == 75
    assert not any(line.startswith("scontrol") for line in calls)
    ended, calls = call("slurm.sh")
    assert (ended.returncode, calls) == (2, [])
    assert "usage: sbatch" in ended.stderr


def test_slurm_asks_for_what_the_script_relies_on():
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    assert {"#SBATCH --requeue", "#SBATCH --signal=USR1@120"} <= set(lines)


@pytest.mark.parametrize("status", [0, 75, 2])
def test_a_pod_finds_the_first_and_ends_as_the_stage_does(call, status):
    variables = {"JOBSET_NAME": "rlhf", "REPLICATED_JOB_NAME": "pods", "JOB_COMPLETION_INDEX": "2"}
    ended, calls = call("jobset.sh", "grpo", "--out", "gs://b/r", status=status, PODS="4", **variables)
    assert ended.returncode == status
    assert calls == ["rlhf grpo --out gs://b/r --coordinator rlhf-pods-0-0.rlhf:8476,4,2 --resume auto"]
    _, calls = call("jobset.sh", "sft", "--out", "x", PODS="1", **variables)
    assert calls == ["rlhf sft --out x --resume auto"]
    ended, calls = call("jobset.sh", "sft", "--out", "x", PODS="4")
    assert (ended.returncode != 0, calls) == (True, [])


def test_the_jobset_starts_again_after_75_and_runs_the_script(call):
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    (group,) = jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    (fails,) = [rule for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert 75 in fails["onExitCodes"]["values"]
    assert fails["onExitCodes"]["operator"] == "NotIn"
    assert fails["onExitCodes"]["containerName"] == container["name"]
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    pods = {item["name"]: item["value"] for item in container["env"] if "value" in item}["PODS"]
    assert int(pods) == job["completions"] == job["parallelism"]
    given = {"JOBSET_NAME": jobset["metadata"]["name"], "REPLICATED_JOB_NAME": group["name"]}
    assert {item["name"] for item in container["env"]} == {"PODS", *given}
    assert container["command"][-1].endswith("/jobset.sh")
    _, calls = call("jobset.sh", *container["args"], PODS=pods, JOB_COMPLETION_INDEX="0", **given)
    assert calls[0].startswith("rlhf grpo --out gs://BUCKET/run")
