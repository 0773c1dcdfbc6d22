"""`rlhf COMMAND ...`: the commands, found by name in `rlhf_jax.stages`, and their help."""

import ast
import difflib
import importlib
import importlib.util
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rlhf_jax.cli.output import whole_output

COMMANDS: dict[str, tuple[str, ...]] = {
    "Training": (
        "sft",
        "reward-model",
        "process-reward",
        "dpo",
        "ppo",
        "grpo",
        "online-dpo",
        "rounds",
        "distill",
        "constitutional",
        "rule-rewards",
        "tool-use",
        "pretrain",
        "prune",
    ),
    "Inference and data": ("generate", "search", "rag", "benchmark", "preferences", "clean"),
    "Control": ("rl", "rl-offline", "alphazero"),
    "Models and runs": ("convert", "plan", "score", "inspect", "scaling-laws", "report", "diff", "eject"),
}
"""Names of the commands; each has a module in `rlhf_jax.stages`, or in `cli`, with `Options` and `run`."""

_IN_CLI = ("report", "diff", "eject")


@whole_output()
def main(arguments: Sequence[str] | None = None) -> None:
    """The console command.

    Args:
      arguments: words after `rlhf`; those of the process by default.
    """
    if arguments is not None:
        sys.argv = ["rlhf", *arguments]
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(help_text())
        return
    if name == "--version":
        import rlhf_jax

        print(rlhf_jax.__version__)
        return
    known = [command for group in COMMANDS.values() for command in group]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        print(f"error: there is no command {name}: {hint}rlhf --help lists them all", file=sys.stderr)
        sys.exit(2)
    run_stage(name)


def run_stage(name: str) -> None:
    """Runs a command with the words that stand behind it on the command line."""
    from rlhf_jax.cli.command_line import run_command

    module = importlib.import_module(stage_module(name))
    side_by_side = getattr(module, "SIDE_BY_SIDE", False)
    run_command(
        module.run,
        module.Options,
        module.__doc__,
        side_by_side=side_by_side,
        plan=getattr(module, "plan", None),
        name=f"rlhf {name}",
        arguments=sys.argv[2:],
    )


def stage_module(name: str) -> str:
    """The module of a command."""
    room = "cli" if name in _IN_CLI else "stages"
    return f"rlhf_jax.{room}.{name.replace('-', '_')}"


def help_text() -> str:
    """Text of `rlhf --help`: every command with the first line of its module, without importing any."""
    lines = ["usage: rlhf COMMAND [OPTIONS]", "", "RLHF, and the reinforcement learning beneath it, in JAX."]
    for group, names in COMMANDS.items():
        lines += ["", f"{group}:"]
        lines += [_wrapped(f"  {name:<16}{_summary(name)}", indent=18) for name in names]
    examples = (
        "rlhf sft --model MODEL --data rows.jsonl --out runs/sft",
        "rlhf grpo --model runs/sft --data gsm8k.jsonl --out runs/grpo \\\n"
        "      --rewards rlhf_jax.rewards.verifiers:gsm8k_reward",
        "rlhf generate --model runs/grpo --prompt 'What is 2 + 2?'",
    )
    lines += ["", "Examples:", *(f"  {example}" for example in examples)]
    lines += ["", "rlhf COMMAND --help lists the options of a command."]
    return "\n".join(lines)


def _wrapped(line: str, *, indent: int) -> str:
    """The line over as many as a terminal needs; whole where the output has no width."""
    if not sys.stdout.isatty():
        return line
    width = shutil.get_terminal_size().columns
    return textwrap.fill(line, max(width, 2 * indent), subsequent_indent=" " * indent)


def _summary(name: str) -> str:
    spec = importlib.util.find_spec(stage_module(name))
    assert spec is not None
    assert spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0].rstrip(".")
