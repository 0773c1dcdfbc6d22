"""Files are opened and written in one place, `core.files`: whole, synced, with a digest, named in errors."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOME = "rlhf_jax/core/files/"
EXEMPT = {
    "rlhf_jax/sandbox/limits.py": "a limited process reads /proc, and none of a run's files",
    "rlhf_jax/sandbox/workers.py": "a limited process opens /dev/null",
    "rlhf_jax/checkpoint/manifest.py": "hashes files of gigabytes as a stream",
    "rlhf_jax/training/loading.py": "takes a sample of a published checkpoint of gigabytes",
    "rlhf_jax/models/loading.py": "reads the first bytes of a GGUF file, and names in the hub cache",
    "rlhf_jax/cli/output.py": "opens /dev/null in the place of a standard output that is lost",
    "rlhf_jax/metrics/rendering.py": "templates are part of the package",
    "rlhf_jax/cli/eject.py": "its templates are part of the package",
    "rlhf_jax/metrics/pictures.py": "pictures are drawn and saved there, and nowhere else",
    "rlhf_jax/data/images.py": "Pillow opens the bytes of an image in memory",
    "rlhf_jax/cli/commands.py": "docstrings are read from the package's own modules",
}
METHODS = {"open", "write_text", "write_bytes", "read_text", "read_bytes"}
FUNCTIONS = {"save", "savez", "savez_compressed", "savetxt", "dump", "to_csv", "to_parquet"}
MODULES = {"np", "numpy", "jnp", "json", "pickle", "yaml"}


def unsafe_calls(source):
    """(line, call) of every call that opens or writes a file, or reads JSON out of one."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id == "open":
            yield node.lineno, "open"
        if not isinstance(called, ast.Attribute):
            continue
        owner = called.value.id if isinstance(called.value, ast.Name) else ""
        if called.attr in METHODS and owner not in ("files", "stores"):
            yield node.lineno, f".{called.attr}"
        if called.attr in FUNCTIONS and owner in MODULES:
            yield node.lineno, f"{owner}.{called.attr}"
        if called.attr == "load" and owner in ("np", "numpy", "json"):
            yield node.lineno, f"{owner}.load"
        if called.attr == "savefig":
            yield node.lineno, ".savefig"


def test_nobody_else_writes_files():
    found = []
    for folder in ("rlhf_jax", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith(HOME) and name not in EXEMPT:
                calls = unsafe_calls(path.read_text(encoding="utf-8"))
                found += [f"{name}:{line}: {call}" for line, call in calls]
    assert not found, "write and read files of runs by rlhf_jax.core.files:\n" + "\n".join(found)


def test_every_exemption_is_needed():
    for name in EXEMPT:
        assert list(unsafe_calls((ROOT / name).read_text(encoding="utf-8"))), f"{name} needs no exemption"


@pytest.mark.parametrize(
    "source",
    [
        "with open(path, 'wb') as file: pass",
        "with path.open('a') as file: pass",
        "(folder / 'x').write_text('a')",
        "path.write_bytes(b'')",
        "np.savez(path, **arrays)",
        "np.save(path, array)",
        "json.dump(data, file)",
        "np.load(path)",
        "json.loads(path.read_text())",
        "figure.savefig(path)",
    ],
)
def test_the_rule_sees(source):
    assert list(unsafe_calls(source))


@pytest.mark.parametrize(
    "source",
    ["files.write_text(path, 'a')", "files.read_bytes(path)", "self._open()"],
)
def test_the_rule_lets_pass(source):
    assert not list(unsafe_calls(source))
