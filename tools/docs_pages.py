"""Pages of docs/ that are made from the code: the command line, the reference, and tables in other pages.

    python tools/docs_pages.py

writes them; `tests/integration/test_documentation.py` fails where they are not what this would write.
"""

import ast
import collections
import importlib
import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import paper_index
import tyro

from rlhf_jax.cli.commands import COMMANDS, stage_module
from rlhf_jax.cli.parsing import examples
from rlhf_jax.core import foreign_names
from rlhf_jax.metrics.health import HEALTH_CHECKS
from rlhf_jax.stages.defaults import PUBLISHED

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOUSE = ROOT / "rlhf_jax"
_MADE = "<!-- Made by tools/docs_pages.py: edit the docstrings, and run it. -->"
_SHARED_BY = 3
"""An option that so many commands have, told in the same words, is told once."""

Row = tuple[str, str, str]
"""Flag, default, meaning."""


def pages() -> dict[str, str]:
    """Every page by its path from the root."""
    return {
        "docs/commands.md": commands_page(),
        "docs/papers.md": paper_index.page(_MADE),
        "docs/coming_from.md": with_tables("docs/coming_from.md"),
        "docs/troubleshooting.md": with_tables("docs/troubleshooting.md"),
        "docs/guide/defaults.md": with_tables("docs/guide/defaults.md"),
        **reference_pages(),
    }


def with_tables(name: str) -> str:
    """A page written by hand, with its tables between `<!-- table: NAME -->` and `<!-- end -->` anew."""

    def filled(found: re.Match[str]) -> str:
        return "\n".join([found[1], *_TABLES[found[2]](), "<!-- end -->"])

    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(r"(<!-- table: (\w+) -->)\n.*?<!-- end -->", filled, text, flags=re.DOTALL)


def _foreign_table(names: Mapping[str, tuple[str, ...]]) -> list[str]:
    rows = (f"| `{theirs}` | {', '.join(f'`{name}`' for name in ours)} |" for theirs, ours in names.items())
    return ["| there | here |", "|---|---|", *rows]


def _health_table() -> list[str]:
    rows = (
        f"| {check.title} | {_sentence(check.detect.__doc__)} | {check.advice} |" for check in HEALTH_CHECKS
    )
    return ["| warning | what it means | what to do |", "|---|---|---|", *rows]


def _defaults_table() -> list[str]:
    rows = []
    for name, found in PUBLISHED.items():
        numbers = found.learning_rate, found.adapter_learning_rate, found.beta
        cells = ["" if number is None else f"{number:g}" for number in numbers]
        cells.append(", ".join(f"{key} {value:g}" for key, value in found.loss_params.items()))
        rows.append(f"| {name} | {' | '.join(cells)} | {found.source} |")
    titles = ("method", "learning rate", "with an adapter", "beta", "others", "source")
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *rows]


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split())


_TABLES = {
    "TRL": lambda: _foreign_table(foreign_names.TRL),
    "TRAINER": lambda: _foreign_table(foreign_names.TRAINER),
    "PEFT": lambda: _foreign_table(foreign_names.PEFT),
    "VERL": lambda: _foreign_table(foreign_names.VERL),
    "OPENRLHF": lambda: _foreign_table(foreign_names.OPENRLHF),
    "HEALTH": _health_table,
    "DEFAULTS": _defaults_table,
}


# The command line ------------------------------------------------------------------------------------


def commands_page() -> str:
    """Every command with its options, those that many have in common at the end."""
    groups = {name: _groups_of(name) for names in COMMANDS.values() for name in names}
    counts = collections.Counter(
        (title, row) for of_command in groups.values() for title, rows in of_command.items() for row in rows
    )
    shared: dict[str, list[Row]] = {}
    for (title, row), count in counts.items():
        if count >= _SHARED_BY and title not in ("options", "positional arguments"):
            shared.setdefault(title, []).append(row)
    lines = [
        "# Command line",
        "",
        _MADE,
        "",
        "`rlhf COMMAND --help` shows the same. `--config FILE` reads options from YAML, such as the",
        "`config.yaml` of a run folder; flags override it. Options by names that they have in TRL, verl or",
        "Hugging Face's Trainer are answered with ours: [coming from](coming_from.md).",
    ]
    for kind, names in COMMANDS.items():
        lines += ["", f"## {kind}"]
        for name in names:
            lines += ["", f"### rlhf {name}", "", *_command_lines(name, groups[name], shared)]
    lines += ["", "## Options of many commands"]
    for title, rows in shared.items():
        lines += ["", f"### {title.capitalize()}", "", *_table(rows)]
    return "\n".join(lines) + "\n"


def _command_lines(
    name: str, groups: Mapping[str, list[Row]], shared: Mapping[str, list[Row]]
) -> Iterator[str]:
    text = importlib.import_module(stage_module(name)).__doc__ or ""
    yield from text.strip().split("\n\n")[0].splitlines()
    shown = examples(text)
    if shown:
        yield from ("", "```bash", *shown.splitlines(), "```")
    for title, rows in groups.items():
        in_common = shared.get(title, [])
        own = [row for row in rows if row not in in_common]
        place = title.replace(" ", "-").replace(".", "")
        if len(own) < len(rows):
            yield from ("", f"The [{title}](#{place})" + (", but:" if own else "."))
        elif title != "options":
            yield from ("", f"{title.capitalize()}:")
        if own:
            yield from ("", *_table(own))


def _groups_of(name: str) -> dict[str, list[Row]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(importlib.import_module(stage_module(name)).Options)
    found: dict[str, list[Row]] = {}
    _collect(parser, found, "")
    return found


def _collect(parser: Any, found: dict[str, list[Row]], prefix: str) -> None:
    for group in parser._action_groups:
        rows = [_row(action) for action in group._group_actions if "--help" not in action.option_strings]
        choices = [action.choices for action in group._group_actions if isinstance(action.choices, dict)]
        if rows and not choices:
            found.setdefault(f"{prefix}{group.title}", []).extend(rows)
        for of_kind in choices:
            for kind, inner in of_kind.items():
                _collect(inner, found, f"{kind} ")


def _row(action: Any) -> Row:
    names = [name for name in action.option_strings if not name.startswith("--no-")]
    flag = names[0] if names else action.dest.upper()
    meaning, _, default = (action.help or "").rpartition(" (default: ")
    if not default.endswith(")") or not _:
        meaning, default = (action.help or "").removesuffix(" (required)"), ""
        required = (action.help or "").endswith("(required)")
        return f"`{flag}`", "required" if required else "", _one_line(meaning)
    default = default.removesuffix(")")
    return f"`{flag}`", f"`{_cell(default)}`" if default else "", _one_line(meaning)


def _one_line(text: str) -> str:
    return _cell(" ".join(text.split()))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _table(rows: list[Row]) -> Iterator[str]:
    yield "| option | default | meaning |"
    yield "|---|---|---|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


# The reference ---------------------------------------------------------------------------------------


def reference_pages() -> dict[str, str]:
    """A page for each room: its modules in words, then their public names for mkdocstrings."""
    rooms = sorted(path.parent for path in HOUSE.glob("*/__init__.py"))
    found = {f"docs/reference/{room.name}.md": _room_page(room) for room in rooms}
    index = [
        "# Reference",
        "",
        _MADE,
        "",
        "Every public name of the package, by room, with types, shapes and equations. The pages show the",
        "docstrings on the site; in the repository they list the modules.",
        "",
        "| room | what is in it |",
        "|---|---|",
        *(f"| [{room.name}]({room.name}.md) | {_cell(_summary(room / '__init__.py'))} |" for room in rooms),
    ]
    return {"docs/reference/index.md": "\n".join(index) + "\n", **found}


def public_modules(room: pathlib.Path) -> list[pathlib.Path]:
    """Modules of a room that define public names, without those that only a process of ours runs."""
    found = [path for path in sorted(room.rglob("*.py")) if _public_names(path)]
    return [path for path in found if not path.stem.endswith("_worker")]


def _public_names(path: pathlib.Path) -> list[str]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    defined = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in body if isinstance(node, defined) and not node.name.startswith("_")]


def _room_page(room: pathlib.Path) -> str:
    modules = public_modules(room)
    lines = [f"# rlhf_jax.{room.name}", "", _MADE, "", _summary(room / "__init__.py"), ""]
    lines += ["| module | |", "|---|---|"]
    lines += [f"| `{_dotted(path)}` | {_cell(_summary(path))} |" for path in modules]
    for path in modules:
        lines += ["", f"::: {_dotted(path)}"]
    return "\n".join(lines) + "\n"


def _dotted(path: pathlib.Path) -> str:
    return re.sub(r"\.__init__$", "", ".".join(path.relative_to(ROOT).with_suffix("").parts))


def _summary(path: pathlib.Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def main() -> None:
    """Writes the pages."""
    for name, text in pages().items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(name)


if __name__ == "__main__":
    main()
