"""The index of papers, from the docstrings: what each function is, where it is printed, and what tests it.

A docstring names its source, with the equation, where there is one: `GAE (Schulman et al. 2016, eq. 16)`.
"""

import ast
import collections
import functools
import pathlib
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROOMS = {
    "Losses": "losses",
    "Returns, advantages, divergences": "kernels",
    "Algorithms on language models": "algorithms",
    "Classic reinforcement learning": "rl",
    "Rewards": "rewards",
    "Feedback": "feedback",
    "Generation": "generation",
    "Search": "search",
    "Models and adapters": "models",
    "Data": "data",
    "Evaluation": "evaluation",
}
_NUMBER = r"\w+(?:\.\w+)*"
_PLACE = (
    r"(?:eqs?\.|sections?|[Aa]lgorithms?|appendix|table|definition|example|chapter) "
    rf"{_NUMBER}(?:(?: to | and |-){_NUMBER})?"
)
_NAME = r"[A-Z][\w'.-]*\w"
_WHO = rf"{_NAME}(?:(?:,| &| and) {_NAME})*(?: et al\.)?"
_SOURCE = re.compile(rf"{_WHO},? (?:19|20)\d\d(?:, {_PLACE})*|arXiv \d{{4}}\.\d{{4,5}}(?:, {_PLACE})*")

Entry = tuple[str, str, str, str]
"""What it is, its source, its name, the file that tests it."""


def entries(room: str) -> Iterator[Entry]:
    """The functions, classes and modules of a room whose docstrings name a source."""
    for path in sorted((ROOT / "rlhf_jax" / room).rglob("*.py")):
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        first = (ast.get_docstring(tree) or "").split("\n\n")[0]
        if _sources(first):
            yield _plain(first), _sources(first), dotted, _test_of(room, path.stem, path.stem)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                always = path.stem == "kl" or node.name.endswith("_loss") or _is_variant(node)
                text = re.split(r"\n(?:Args|Attributes|Returns|Raises):", ast.get_docstring(node) or "")[0]
                if always or _sources(text):
                    # The estimators of the KL share a source, that of their module.
                    source = (
                        _sources(text)
                        or (path.stem == "kl" and _sources(ast.get_docstring(tree) or ""))
                        or ""
                    )
                    tested = _test_of(room, node.name, path.stem)
                    yield _plain(text.split("\n\n")[0]), source, f"{dotted}.{node.name}", tested


def _is_variant(node: ast.AST) -> bool:
    if not isinstance(node, ast.FunctionDef) or node.args.args:
        return False
    return isinstance(node.returns, ast.Name) and node.returns.id == "GRPOVariant"


def _sources(text: str) -> str:
    found = _SOURCE.findall(" ".join(text.split()))
    return "; ".join(dict.fromkeys(found))


def _plain(text: str) -> str:
    """The first sentence without what stands in the column beside it."""
    text = " ".join(text.split())
    text = re.sub(r" \([^()]*\)", lambda found: "" if _SOURCE.search(found[0]) else found[0], text)
    return text.rstrip(".:")


def _test_of(room: str, name: str, module: str) -> str:
    """The test file that says the name most often, of its room where there are any; else of its module."""
    word = name if any(name in words for words in _tests().values()) else module
    counts = {path: words[word] for path, words in _tests().items()}
    own = {path: count for path, count in counts.items() if path.startswith(f"tests/unit/{room}/") and count}
    best = max(own or counts, key=lambda path: (own or counts)[path])
    return best if counts[best] else ""


@functools.cache
def _tests() -> dict[str, collections.Counter[str]]:
    """How often each test file says each word."""
    return {
        path.relative_to(ROOT).as_posix(): collections.Counter(
            re.findall(r"\w+", path.read_text(encoding="utf-8"))
        )
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
    }


def page(made: str) -> str:
    """The whole page."""
    lines = [
        "# Papers",
        "",
        made,
        "",
        "Every loss, estimator and algorithm: its source with the equation, our function, and the file that",
        "tests it. Where we depart from the print, the docstring says so. No source: common usage. Of",
        "papers since 2025 a number stands where the print, or a library that quotes it, could be read; the",
        "formulas of the others are those of the authors' code, of TRL or of verl, and have none here.",
    ]
    for title, room in ROOMS.items():
        lines += ["", f"## {title}", "", "| what | source | here | test |", "|---|---|---|---|"]
        for what, source, name, test in entries(room):
            short = name.rpartition(".")[2]
            link = f"[`{short}`](reference/{room}.md)"
            tested = f"[{pathlib.PurePosixPath(test).stem}](../{test})" if test else ""
            lines.append(f"| {_cell(what)} | {source} | {link} | {tested} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
