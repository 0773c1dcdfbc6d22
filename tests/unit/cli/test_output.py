"""Printing costs no run its life: full disks and readers that leave."""

import subprocess
import sys

import pytest

RUN = """
import dataclasses, sys
from rlhf_jax.cli.command_line import run_command

@dataclasses.dataclass
class Options:
    '''Options.

    Attributes:
      out: a file.
    '''
    out: str = ""

def run(options):
    for number in range(5000):
        print("a line of output", number, flush=number % 100 == 0)
    open(options.out, "w").write("done")

run_command(run, Options, "Prints.")
"""


@pytest.mark.parametrize("command", ["--help", "sft --help"])
def test_a_reader_that_leaves(command):
    words = f"{sys.executable} -m rlhf_jax {command} | head -c 20"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {words}"], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode == 0
    assert len(done.stdout) == 20


def test_a_full_disk_under_standard_output(tmp_path):
    command = [sys.executable, "-c", RUN, "--out", str(tmp_path / "out")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.stderr.startswith("error: standard output cannot be written (No space left on device)")
    assert done.stderr.count("\n") == 1
    assert done.returncode == 2
    assert (tmp_path / "out").read_text() == "done"


def test_a_run_goes_on_when_its_reader_has_left(tmp_path):
    words = f'{sys.executable} -c "$0" --out {tmp_path / "out"} | head -n 1'
    done = subprocess.run(["bash", "-c", words, RUN], capture_output=True, text=True)
    assert done.stdout == "a line of output 0\n"
    assert done.stderr == ""
    assert (tmp_path / "out").read_text() == "done"
