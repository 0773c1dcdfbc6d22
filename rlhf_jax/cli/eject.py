"""A training script of your own, with the loop in sight, to copy and to change.

    rlhf eject grpo mine.py
    rlhf eject dpo my_dpo.py
    python mine.py --model runs/sft --data gsm8k.jsonl --out runs/mine

The script has no more than 150 lines and needs nothing but rlhf_jax: it samples, rewards, makes batches and
updates step by step, where the command does the same with more options.
"""

import dataclasses
import pathlib
from importlib import resources
from typing import Literal

import tyro

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError

Algorithm = Literal["sft", "dpo", "ppo", "grpo"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of ejecting.

    Attributes:
      algorithm: what the script trains by.
      file: where it is written; a file that is there stays as it is.
    """

    algorithm: tyro.conf.Positional[Algorithm]
    file: tyro.conf.Positional[pathlib.Path]


def run(options: Options) -> None:
    """Writes the script, and says how to run it.

    Raises:
      UserError: there is a file of that name, or it cannot be written.
    """
    if files.is_file(options.file):
        raise UserError(f"{options.file}: there is such a file already: give another name, or remove it")
    try:
        files.write_whole(options.file, template(options.algorithm).replace("mine.py", options.file.name))
    except OSError as error:
        raise UserError(f"{options.file}: cannot be written ({error.strerror}): give another path") from error
    print(f"{options.file}: written; python {options.file} --help tells its options")


def template(algorithm: Algorithm) -> str:
    """The script as it stands in `rlhf_jax.cli.templates`."""
    return (resources.files("rlhf_jax.cli.templates") / f"{algorithm}.py").read_text(encoding="utf-8")
