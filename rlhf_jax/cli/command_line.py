"""A script's command line: options in, one sentence and an exit status out where something went wrong."""

import contextlib
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from rlhf_jax import distributed
from rlhf_jax.cli.options import flags_of
from rlhf_jax.cli.output import whole_output
from rlhf_jax.cli.parsing import parse, with_plain_resume
from rlhf_jax.core.axes import GATHERED_SAMPLING, axis_rules
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import releasing_locks
from rlhf_jax.distributed.runtime import choose_threads
from rlhf_jax.stages.option_groups import RunOptions
from rlhf_jax.training import EXIT_NOT_FINISHED, Interrupted
from rlhf_jax.training.run_folder import command_words

Options = TypeVar("Options")


@whole_output()
def run_command(
    run: Callable[[Options], Any],
    options_type: type[Options],
    description: str | None,
    *,
    side_by_side: bool = False,
    plan: Callable[[Options], Any] | None = None,
    name: str | None = None,
    arguments: Sequence[str] | None = None,
) -> None:
    """Parses the command line, runs, and turns what went wrong into one sentence and an exit status.

    Status 2 for a mistake of the user; 130 after Ctrl-C; 75, not finished, after SIGTERM, SIGUSR1 or SIGHUP,
    and where another process of the run was lost. The run was saved before it ended by a signal.

    Args:
      description: docstring that tells of the command, with its examples.
      name: of the command, for its help.
      arguments: the words behind it; those of the process by default.
      plan: what `--plan` does instead of running; None for a command that cannot be planned.
      side_by_side: whole runs under `vmap` are all that is computed (`core.compilation.choose_threads`).
    """
    sys.unraisablehook = _print_unless_late
    logging.getLogger("asyncio").addFilter(is_not_late)
    words = sys.argv[1:] if arguments is None else arguments
    try:
        options = parse(options_type, words, name=name, text=description)
        choose_threads(side_by_side=side_by_side)
        use_compile_cache()
        run_options = getattr(options, "run", None)
        if not isinstance(run_options, RunOptions):
            action, place = run, contextlib.nullcontext()
        elif run_options.plan:
            action, place = _planned(plan), for_plan(run_options)
        else:
            action, place = run, on_mesh(run_options)
        with place, releasing_locks():
            action(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted:
        print(f"To go on: {_resumed_command()}", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        resumes = "--resume" in flags_of(options_type) and "--plan" not in words
        how = f"; what was saved before is kept. To go on: {_resumed_command()}" if resumes else "."
        print(f"Stopped{how}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if jax.process_count() == 1:
            raise
        _end_one_of_several(error)


def use_compile_cache() -> None:
    """Keeps compiled programs on disk, so that a second run starts at once.

    The folder is $JAX_COMPILATION_CACHE_DIR, or .cache/jax under the current folder.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path(".cache/jax").absolute()))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    # Where the disk is full, that is said once, of the file that matters.
    warnings.filterwarnings("ignore", message="Error writing persistent compilation cache")


@contextlib.contextmanager
def on_mesh(options: RunOptions) -> Iterator[None]:
    """Joins the other processes, if there are any, and enters the mesh: all that is jitted inside runs on it.

    Raises:
      UserError: the mesh or the hosts are not understood, or not there.
    """
    distributed.init_distributed(
        distributed.DistributedOptions(options.coordinator, options.init_timeout, options.heartbeat_timeout)
    )
    with jax.set_mesh(distributed.make_mesh(options.mesh)), _sampling_rules(options):
        yield


@contextlib.contextmanager
def for_plan(options: RunOptions) -> Iterator[None]:
    """The rules of a run, without its mesh: that of a plan may be of devices that are not here."""
    if options.planned_topology:  # whatever is here is not asked for
        jax.config.update("jax_platforms", "cpu")
    with _sampling_rules(options):
        yield


def _sampling_rules(options: RunOptions) -> contextlib.AbstractContextManager[None]:
    return axis_rules(GATHERED_SAMPLING if options.all_gather_params else {})


def _planned(plan: Callable[[Options], Any] | None) -> Callable[[Options], Any]:
    """Raises: UserError for a command that has no plan."""
    if plan is None:
        raise UserError("--plan goes with rlhf sft, dpo, ppo and grpo: leave it out, or see rlhf plan")
    return plan


def _end_one_of_several(error: Exception) -> None:
    """Ends this process at once: an orderly end would wait for others that wait for this one, or are gone."""
    if distributed.is_lost_peer(error):
        print(f"error: {distributed.lost_peer_message(error)}", file=sys.stderr, flush=True)
        distributed.abort(EXIT_NOT_FINISHED)
    traceback.print_exc()
    distributed.abort(1)


def is_not_late(record: logging.LogRecord) -> bool:
    """True if a line of asyncio's log is news: not if it tells of a write whose save has failed already."""
    error = record.exc_info[1] if record.exc_info else None
    return not (error and "os_error_code" in str(error) and "never retrieved" in record.getMessage())


def _print_unless_late(report: Any) -> None:
    """TensorStore reports writes that end after their save has failed, which has been said already."""
    if not (report.exc_type is RuntimeError and str(report.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(report)


def _resumed_command() -> str:
    words = [word for word in with_plain_resume(command_words()) if word not in ("--resume", "--no-resume")]
    return shlex.join([*words, "--resume"])
