"""Kinds of faults in every command that trains or writes: kills, stops, disks that fail, clocks that step."""

import errno
import functools
import pathlib
import random
import shlex
import shutil
import signal

from fault_lines import LINES, Runs, contents
from fault_server import HANGS, HAS_COMPILER
from fault_world import Found, World, fits, kind
from faults_in_foreign import cut, flipped


@functools.cache
def runs_of(world: World) -> Runs:
    """The tiny runs of a campaign."""
    return Runs(world.root)


def went_on(runs: Runs, name: str, out: pathlib.Path, what: str) -> Found:
    """What a run that was interrupted leaves when the same command is given again."""
    words = runs.words(name, out, again=True)
    code, said, _ = runs.server.run(words, below=out)
    what = f"{what}; then {shlex.join(words[:1])} again"
    if code != 0 and "already holds" not in said:  # what is whole is not made again
        return what, "unexplained", said
    found = contents(out)
    changed = [file for file, digest in runs.notes(name)["files"].items() if found.get(file) != digest]
    return what, "silent" if changed else "right", f"{', '.join(changed)} {said}".strip()


def _chosen(world: World, rng: random.Random, scratch: pathlib.Path) -> tuple[Runs, str, pathlib.Path, int]:
    runs = runs_of(world)
    name = rng.choice(list(LINES))
    scratch.rmdir()  # as deep as the unbroken runs: some files hold the way from one run to another
    return runs, name, scratch, rng.randint(1, runs.notes(name)["calls"])


def kills_of_commands(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Any command killed at a random instant, or at a change to its files, then given again: to the bit."""
    runs, name, out, number = _chosen(world, rng, scratch)
    if rng.random() < 0.5:
        code, _, _ = runs.server.run(runs.words(name, out), below=out, at=number, how=-signal.SIGKILL)
        what = f"{name} killed at change {number}, status {code}"
    else:
        after = rng.uniform(0.05, 1.05) * runs.notes(name)["seconds"]
        code, _, _ = runs.server.run(runs.words(name, out), kill_after=after)
        what = f"{name} killed after {after:.2f} s, status {code}"
    return went_on(runs, name, out, what)


def disks_of_commands(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Any command whose disk is full, read-only or broken from a change on, or for one: one sentence."""
    runs, name, out, number = _chosen(world, rng, scratch)
    how, lasting = rng.choice([errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT]), rng.random() < 0.7
    words = runs.words(name, out)
    code, said, _ = runs.server.run(words, below=out, at=number, how=how, lasting=lasting)
    what = f"{name}, {errno.errorcode[how]} {'from' if lasting else 'at'} change {number}, status {code}"
    if not fits(code, said) or said.count("\nerror: ") + said.startswith("error: ") > 1:
        return what, "unexplained", said
    return went_on(runs, name, out, what)


def clocks_of_commands(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Any command whose clock steps by seconds, hours or years: the same to the bit."""
    runs, name, out, number = _chosen(world, rng, scratch)
    step = rng.choice([-1, 1]) * 10 ** rng.uniform(0, 9)
    code, said, _ = runs.server.run(runs.words(name, out), below=out, clock=(number, step))
    what = f"{name}, the clock {step:+.0f} s at change {number}"
    if code != 0:
        return what, "unexplained", said
    return went_on(runs, name, out, what)


def stops_of_commands(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Any command stopped (SIGSTOP) at a change to its files for a while: the same to the bit."""
    runs, name, out, number = _chosen(world, rng, scratch)
    code, said, _ = runs.server.run(runs.words(name, out), below=out, at=number, how=-signal.SIGSTOP)
    what = f"{name} stopped at change {number}"
    if code != 0:
        return what, "unexplained", said
    return went_on(runs, name, out, what)


def files_of_commands(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Any file that a command leaves damaged, then the command again: named, mended, or without effect."""
    runs, name, out, _ = _chosen(world, rng, scratch)
    source = runs.run(name)
    shutil.copytree(source, out)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    path = rng.choice(files)
    how, content = rng.choice(["flip", "cut", "remove", "swap"]), path.read_bytes()
    match how if content else "remove":
        case "flip":
            path.write_bytes(flipped(content, rng))
        case "cut":
            path.write_bytes(cut(content, rng))
        case "remove":
            path.unlink()
        case "swap":
            path.write_bytes(rng.choice(files).read_bytes())
    words = runs.words(name, out, again=True)
    code, said, _ = runs.server.run(words, below=out)
    what = f"{name}, {how} of {path.relative_to(out)}, status {code}"
    if not fits(code, said) or code == HANGS:
        return what, "unexplained", said
    if code != 0 or "warning: " in said:
        return what, "right", said
    found = contents(out, source)
    damaged, expected = str(path.relative_to(out)), runs.notes(name)["files"].items()
    # Of a step's files, those of the step are the damaged ones.
    changed = [
        file for file, digest in expected if not damaged.startswith(file) and found.get(file) != digest
    ]
    return what, "silent" if changed else "right", f"{', '.join(changed)} {said}".strip()


if HAS_COMPILER:
    for function in (
        kills_of_commands,
        disks_of_commands,
        clocks_of_commands,
        stops_of_commands,
        files_of_commands,
    ):
        kind(function)
