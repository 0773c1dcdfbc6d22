"""Options as flags and JSON, what is impossible among them, and what a resumed run may change."""

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import check_ranges
from rlhf_jax.metrics import make_loggers
from rlhf_jax.training.run_folder import read_held_run

if TYPE_CHECKING:
    from rlhf_jax.stages.option_groups import RunOptions

Options = TypeVar("Options")


WITHOUT_PREFIX = (
    "run",
    "pairs",
    "prompts",
    "completions",
    "task",
    "loss_params",
    "ptx",
    "process",
    "sync",
    "off_policy",
    "variant",
    "replay",
    "prune",
    "limits",
    "decoder",
)


# They change how a run is watched, or how long it is, and nothing of what it computes until then.
_MAY_DIFFER = """
    --out --resume --steps --num-train-epochs --save-every --eval-every --max-to-keep --quiet --report
    --micro-batches --eval-data --eval-reward --eval-count --samples --mesh --all-gather-params --coordinator
    --init-timeout --heartbeat-timeout --profile --peak-tflops --log --engine --prompts --sample-tokens
    --against --remat --attention-backend --plan --log-completions --num-completions-to-print
    --reward-workers --reward-timeout
""".split()  # noqa: SIM905


def to_json(options: Any) -> Any:
    """Options as JSON types."""
    if dataclasses.is_dataclass(options):
        return {f.name: to_json(getattr(options, f.name)) for f in dataclasses.fields(options)}
    if isinstance(options, list | tuple):
        return [to_json(item) for item in options]
    return options if isinstance(options, bool | int | float | str | None) else str(options)


def flags(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by their names on the command line, as `to_json` gives them."""
    named: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            named |= flags(value, prefix if name in WITHOUT_PREFIX else f"{prefix}{name}.")
        else:
            named[f"--{prefix}{name}".replace("_", "-")] = value
    return named


def brief(options: Any) -> Any:
    """A stage's options; one far shorter than the script's own gets a shorter warm-up."""
    if options.optimizer.warmup_steps is None:
        return options
    warmup = min(options.optimizer.warmup_steps, options.run.num_steps // 4)
    return dataclasses.replace(options, optimizer=dataclasses.replace(options.optimizer, warmup_steps=warmup))


def with_steps(options: Options, rows: int, batch_size: int) -> Options:
    """Options of a stage whose run knows its steps: the given ones, or those of its passes over the data."""
    run: "RunOptions" = options.run  # pyright: ignore[reportAttributeAccessIssue]
    if run.steps is not None:
        return options
    steps = max(math.ceil(run.num_train_epochs * rows / batch_size), 1)
    run = dataclasses.replace(run, steps=steps)
    return dataclasses.replace(options, run=run)  # pyright: ignore[reportArgumentType]


def check_numbers(options: Any) -> None:
    """Raises: UserError where a number is out of the range that stands with its field."""
    check_ranges(options, _flag)


def _flag(path: Sequence[str]) -> str:
    """The name on the command line of a field, by its path."""
    *groups, name = path
    return "--" + ".".join([*(g for g in groups if g not in WITHOUT_PREFIX), name]).replace("_", "-")


def check_divides(part_name: str, part: int, whole_name: str, whole: int) -> None:
    """Raises: UserError where `part` does not divide `whole`."""
    if part < 1 or whole % part:
        raise UserError(f"{whole_name} {whole} is not divisible by {part_name} {part}: change one of them")


def check(options: Any, run: "RunOptions", stage: str) -> None:
    """Looks at the options and at the run folder, before anything is read or written.

    Raises:
      UserError: a number out of range, or the folder holds a run that this one cannot go on with.
    """
    check_numbers(options)
    make_loggers(run.log, run.out, stage=stage)  # refuses names that are none, before anything is read
    held = read_held_run(run.out, stage, resume=run.resume or bool(run.plan))
    check_same_options(options, held, run.out, "--plan" if run.plan else "--resume")


def differing_options(options: Any, held: Mapping[str, Any]) -> list[str]:
    """Flags by which two runs compute something else."""
    ours, theirs = flags(to_json(options)), flags(held)
    return [
        name for name in sorted(theirs.keys() & ours.keys() - set(_MAY_DIFFER)) if ours[name] != theirs[name]
    ]


def check_same_options(options: Any, held: Mapping[str, Any], out: Path, flag: str = "--resume") -> None:
    """Raises: UserError where a run with `flag` would compute something else than the one in `out` does."""
    ours, theirs = flags(to_json(options)), flags(held)
    for name in differing_options(options, held)[:1]:
        raise UserError(
            f"{out}: its run has {name} {_shown(theirs[name])}, not {_shown(ours[name])}: "
            f"give {flag} the same options, or choose another --out"
        )
    _check_same_schedule(ours, theirs, out)


def _check_same_schedule(ours: Mapping[str, Any], theirs: Mapping[str, Any], out: Path) -> None:
    """Raises: UserError where another number of steps would give the learning rate another course."""
    passes = "--steps" if ours.get("--steps") is not None else "--num-train-epochs"
    before, now = theirs.get(passes), ours.get(passes)
    decays = ours.get("--optimizer.schedule", "constant") != "constant"
    if decays and not ours["--optimizer.total-steps"] and None not in (before, now) and before != now:
        raise UserError(
            f"{out}: the learning rate of its run falls over {passes} {before}, which {passes} {now} would "
            f"change in the middle: give --resume the same {passes}, or start another run with --model {out}"
        )


def check_same_data(out: Path, fingerprint: str, *, begun: bool) -> None:
    """Notes which data a run is of whose parts are kept as files, one by one.

    Args:
      fingerprint: as `data.pipeline.fingerprint` gives it.
      begun: whether some of it is there already.

    Raises:
      UserError: that was made of other data.
    """
    path = out / "data.json"
    if begun:
        held = files.read_json(path, keys=("fingerprint",), remedy=f"remove {out}, or choose another --out")
        if held["fingerprint"] != fingerprint:
            raise UserError(
                f"{out}: its items or prompts are not those of --data now: give --resume the same data, or "
                "choose another --out"
            )
    files.write_json(path, {"fingerprint": fingerprint})


def _shown(value: Any) -> str:
    words = [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return shlex.join(words) or "(none)"


def check_rewards(rewards: Sequence[Any], what: str = "") -> None:
    """Raises: UserError where nothing says what an answer is worth.

    Args:
      rewards: by name, or as objects.
      what: the flags that would do in the place of --rewards.
    """
    if not rewards:
        raise UserError(
            f"nothing says what an answer is worth: give --rewards{what}, such as --rewards my_rewards:exact"
        )
