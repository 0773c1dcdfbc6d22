"""Notebooks of docs/notebooks/: written as scripts in percent format, executed, and kept with their outputs.

    python tools/notebooks.py                 # all
    python tools/notebooks.py own_loss        # some

Each `NAME.py` becomes `NAME.ipynb`: cells begin with `# %%`, those of text with `# %% [markdown]`. What a
cell prints stands below it, and so do the pictures that it draws with pyplot, as in Jupyter.
"""

import ast
import base64
import contextlib
import io
import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "docs" / "notebooks"
Cell = tuple[str, str]
"""("markdown" or "code", text)."""


def cells_of(text: str) -> list[Cell]:
    """The cells of a script."""
    found = []
    for part in re.split(r"^# %%", text, flags=re.M)[1:]:
        head, _, body = part.partition("\n")
        if "[markdown]" in head:
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            found.append(("markdown", "\n".join(lines)))
        else:
            found.append(("code", body.strip()))
    return found


def execute(code: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Outputs of a code cell: what it prints, the value of an expression at its end, and its pictures."""
    tree = ast.parse(code)
    last = tree.body[-1] if tree.body else None
    if isinstance(last, ast.Expr):
        tree.body.pop()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        value = (
            eval(compile(ast.Expression(last.value), "cell", "eval"), names)
            if isinstance(last, ast.Expr)
            else None
        )
        if value is not None:
            print(repr(value))
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())})
    for picture in _pictures():
        data = {"image/png": base64.b64encode(picture).decode("ascii")}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    return outputs


def _pictures() -> Iterator[bytes]:
    """The figures that pyplot holds, which are closed."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:  # no cell has drawn anything
        return
    for number in pyplot.get_fignums():
        data = io.BytesIO()
        pyplot.figure(number).savefig(data, format="png", dpi=80)
        pyplot.close(number)
        yield data.getvalue()


def notebook(cells: list[Cell]) -> dict[str, Any]:
    """The cells as a notebook, executed from the first to the last in a folder of their own."""
    os.environ.setdefault("MPLBACKEND", "agg")
    made, names, count = [], {"__name__": "notebook"}, 0
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for place, (kind, text) in enumerate(cells):
            cell: dict[str, Any] = {
                "cell_type": kind,
                "id": f"cell{place}",
                "metadata": {},
                "source": _lines(text),
            }
            if kind == "code":
                count += 1
                cell |= {"execution_count": count, "outputs": execute(text, names)}
            made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    """Makes the notebooks that are named, or all."""
    for script in sorted(FOLDER.glob("*.py")):
        if sys.argv[1:] in ([], ["all"]) or script.stem in sys.argv[1:]:
            made = notebook(cells_of(script.read_text(encoding="utf-8")))
            script.with_suffix(".ipynb").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
            print(script.with_suffix(".ipynb"), flush=True)


if __name__ == "__main__":
    main()
