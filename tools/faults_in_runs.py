"""Kinds of faults in runs: each is a function that draws one case, does it, and says what came of it."""

import functools
import hashlib
import json
import pathlib
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fault_world import COMMAND_LINES, ROOT, Found, World, finish, fits, judged, kind, start
from faults_in_inputs import mutated_json

from rlhf_jax.data.tokenizers import byte_tokenizer, load_tokenizer
from rlhf_jax.metrics import read_metrics, write_report
from rlhf_jax.sweep import sweep
from rlhf_jax.training.loading import load
from rlhf_jax.training.run_folder import load_reward_model

SCORERS = "reward-model", "process-reward"

# Processes that die ---------------------------------------------------------------------------------


def contents(name: str, folder: pathlib.Path) -> str:
    """The parameters of a run and its metrics, but for times."""
    folder = folder / "round_2" if name == "rounds" else folder
    if name in SCORERS:
        params = load_reward_model(folder).params
    elif name == "ppo":
        params = None  # its policy is a part of what is saved; the metrics have every digit
    else:
        params = load(folder).params
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]
    lines = [{k: v for k, v in line.items() if not k.startswith("time")} for line in read_metrics(folder)]
    return hashlib.sha256(b"".join(leaves) + json.dumps(lines, sort_keys=True).encode()).hexdigest()


def resumed(world: World, name: str, folder: pathlib.Path, what: str) -> tuple[str, str, str]:
    """What a run that was stopped leaves when it goes on."""
    code, said = finish(start(world.words(name, folder, "--resume")))
    if code != 0:
        return what, "unexplained", said
    equal = contents(name, folder) == contents(name, world.run(name))
    return what, "right" if equal else "silent", said


@kind
def kills(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """SIGKILL at random instants, then `--resume`: the run ends to the bit."""
    name = rng.choice(list(COMMAND_LINES))
    deaths = 0
    for _ in range(rng.choice([1, 2, 4, 8])):
        process = start(world.words(name, scratch / "run", "--resume"))
        time.sleep(rng.uniform(0, 1.05) * world.seconds(name))
        deaths += process.poll() is None
        process.kill()
        process.communicate()
    return *resumed(world, name, scratch / "run", f"{name}, killed {deaths} times"), deaths


@kind
def signals(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Signals in any order, then `--resume`: the run ends to the bit."""
    name = rng.choice(list(COMMAND_LINES))
    process, sent = start(world.words(name, scratch / "run")), []
    for _ in range(rng.randint(1, 3)):
        time.sleep(rng.uniform(0, 0.6) * world.seconds(name))
        number = rng.choice(["INT", "TERM", "HUP", "USR1", "STOP"])
        process.send_signal(getattr(signal, f"SIG{number}"))
        sent.append(number)
        if number == "STOP":
            time.sleep(0.2)
            process.send_signal(signal.SIGCONT)
    code, said = finish(process)
    what = f"{name}, {' '.join(sent)}"
    if not fits(code, said) and code >= 0 and code != 1:
        return what, "unexplained", said
    return resumed(world, name, scratch / "run", what)


@kind
def pairs(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Two processes with one folder: one refuses, and the other's run is whole."""
    name = rng.choice(list(COMMAND_LINES))
    first = start(world.words(name, scratch / "run", "--resume"))
    time.sleep(rng.uniform(0, 0.8) * world.seconds(name))
    second = start(world.words(name, scratch / "run", "--resume"))
    ends = [finish(first), finish(second)]
    what = f"{name}, statuses {[code for code, _ in ends]}"
    if not all(fits(*end) for end in ends):
        return what, "unexplained", "\n".join(said for _, said in ends)
    return resumed(world, name, scratch / "run", what)


@kind
def full_disks(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Files that cannot grow beyond a random size: one sentence, and with room the run ends to the bit."""
    name, most = rng.choice(list(COMMAND_LINES)), int(2 ** rng.uniform(0, 6))
    code, said = finish(start(world.words(name, scratch / "run"), f"ulimit -f {most};"))
    what = f"{name}, files of {most} KiB at most, status {code}"
    if not fits(code, said):
        return what, "unexplained", said
    return resumed(world, name, scratch / "run", what)


# Files that change ----------------------------------------------------------------------------------

DECIDING = ("model.json", "tokenizer/*", "checkpoints/**/*")


def computed(folder: pathlib.Path, name: str) -> str:
    """What the policy or the reward model of a run computes, its text included."""
    model = load_reward_model(folder) if name in SCORERS else None
    policy = load(folder) if model is None else model.body
    params = policy.params if model is None else model.params
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]
    tokenizer = policy.tokenizer
    names = sorted(tokenizer.special_tokens.items())
    ids = tokenizer.encode("12+30=42")
    parts = policy.config, tokenizer.backend.to_str(), tokenizer.chat_template, names, tokenizer.names, ids
    text = str(parts)
    return hashlib.sha256(b"".join(leaves) + text.encode()).hexdigest()


def damaged(
    folder: pathlib.Path, rng: random.Random, change: Callable[[bytes], bytes | None]
) -> Iterator[str]:
    """Changes a random file that decides what a run computes; None removes it."""
    paths = sorted({path for pattern in DECIDING for path in folder.glob(pattern) if path.is_file()})
    path = rng.choice([path for path in paths if path.stat().st_size])
    content = change(path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    yield str(path.relative_to(folder))


def _on_a_copy(world: World, scratch: pathlib.Path, rng: random.Random, change: Any, how: str) -> Found:
    run = rng.choice(["sft", "sft", "dpo", "grpo", "reward-model", "pretrain"])
    shutil.copytree(world.run(run), scratch / "run")
    (path,) = damaged(scratch / "run", rng, change)
    outcome, said = judged(lambda: computed(scratch / "run", run), _expected(world, run))
    return f"{how} {path} of {run}", outcome, said


@functools.cache
def _expected(world: World, run: str) -> str:
    return computed(world.run(run), run)


@kind
def flips(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """One bit of a file of a run flipped: named, or without effect."""

    def flip(content: bytes) -> bytes:
        place, changed = rng.randrange(len(content)), bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        return bytes(changed)

    return _on_a_copy(world, scratch, rng, flip, "a bit of")


@kind
def cuts(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Files of a run cut, emptied, doubled, filled with noise or removed."""
    ways: dict[str, Callable[[bytes], bytes | None]] = {
        "cut": lambda content: content[: rng.randrange(len(content))],
        "emptied": lambda content: b"",
        "doubled": lambda content: content * 2,
        "zeros": lambda content: bytes(len(content)),
        "noise": lambda content: rng.randbytes(len(content)),
        "removed": lambda content: None,
    }
    how = rng.choice(list(ways))
    return _on_a_copy(world, scratch, rng, ways[how], how)


@kind
def swaps(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Two files of a run exchanged, one replaced by a folder or a loop, or one added."""
    shutil.copytree(world.run("sft"), scratch / "run")
    folder = scratch / "run"
    paths = sorted({path for pattern in DECIDING for path in folder.glob(pattern) if path.is_file()})
    path, other = rng.sample(paths, 2)
    how = rng.choice(["exchanged", "folder", "loop", "added"])
    if how == "exchanged":
        content = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif how == "added":
        (path.parent / rng.choice(["checkpoint", "x", "manifest.json.bak", ".hidden"])).write_bytes(b"x")
    else:
        path.unlink()
        path.mkdir() if how == "folder" else path.symlink_to(path.name)
    outcome, said = judged(lambda: computed(folder, "sft"), _expected(world, "sft"))
    return f"{how} {path.relative_to(folder)}", outcome, said


def _swept(folder: pathlib.Path) -> dict[str, list[Any]]:
    """The numbers of a small sweep, from chunks that are kept or made."""

    def train(key: jax.Array, hyper: dict[str, jax.Array]) -> tuple[None, dict[str, jax.Array]]:
        noise = jax.random.normal(key, (3,))
        return None, {"score": hyper["rate"] * noise[0], "loss": hyper["rate"] + noise}

    hypers = {"rate": jnp.linspace(0.1, 0.5, 5)}
    found = sweep(
        train, jax.random.split(jax.random.key(0), 3), hypers, chunk_size=4, folder=folder, quiet=True
    )
    return {name: np.asarray(values).tolist() for name, values in found.metrics.items()}


@functools.cache
def _whole_sweep(world: World) -> tuple[pathlib.Path, dict[str, list[Any]]]:
    return world.root / "sweep", _swept(world.root / "sweep")


@kind
def sweeps(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Files of a sweep flipped, cut or removed, then the sweep again: its numbers to the bit, or named."""
    source, expected = _whole_sweep(world)
    shutil.copytree(source, scratch / "sweep")
    path = rng.choice(sorted(path for path in (scratch / "sweep").rglob("*") if path.is_file()))
    content, how = bytearray(path.read_bytes()), rng.choice(["flipped", "flipped", "cut", "removed"])
    if how == "flipped":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        path.unlink()

    def again() -> dict[str, list[Any]]:
        _swept(scratch / "sweep")
        return _swept(scratch / "sweep")

    outcome, said = judged(again, expected)
    return f"{path.name} {how}", outcome, said


@kind
def reports(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Reports of runs whose samples, metrics or description are odd."""
    shutil.copytree(world.run("grpo"), scratch / "run")
    path = scratch / "run" / rng.choice(["samples.json", "metrics.jsonl", "config.json"])
    if not path.exists():
        path.write_text("[]")
    path.write_text(mutated_json(path.read_text(), rng), encoding="utf-8", errors="surrogatepass")
    outcome, said = judged(lambda: write_report(scratch / "run"))
    return path.name, outcome, said


@kind
def checkpoints_of_others(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Hugging Face folders whose JSON is mutated, or whose weights are cut."""
    golden = ROOT / "tests" / "golden"
    source = rng.choice(
        [path for path in sorted(golden.glob("hf_*")) if (path / "model.safetensors").exists()]
    )
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, scratch)
    if rng.random() < 0.8:
        path = scratch / "config.json"
        path.write_text(mutated_json(path.read_text(), rng), encoding="utf-8", errors="surrogatepass")
    else:
        path = scratch / "model.safetensors"
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    from rlhf_jax.models import hf

    outcome, said = judged(lambda: hf.load(scratch))
    return f"{source.name} {path.name}", outcome, said


@kind
def tokenizers(world: World, rng: random.Random, scratch: pathlib.Path) -> Found:
    """Tokenizers whose JSON is mutated, or whose template is noise."""
    byte_tokenizer().save(scratch)
    path = scratch / rng.choice(["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
    if path.exists():
        path.write_text(mutated_json(path.read_text(), rng), encoding="utf-8", errors="surrogatepass")
    else:
        path.write_bytes(rng.randbytes(rng.randrange(9)))

    def text() -> str:
        tokenizer = load_tokenizer(scratch)
        return tokenizer.decode(tokenizer.encode("12+30=42"))

    outcome, said = judged(text)
    return path.name, outcome, said
