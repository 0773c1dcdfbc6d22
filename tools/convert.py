"""Hugging Face folders to run folders, and back.

    python tools/convert.py --source ~/Llama-3.2-1B --out runs/llama      # then: sft.py --init runs/llama ...
    python tools/convert.py --source runs/dpo --out exported              # loads in transformers and vLLM

A folder with model.json is a run; its policy is written (of PPO, the actor). A folder with config.json and
safetensors is a Hugging Face checkpoint; its tokenizer comes along.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import tyro

from rlhf_jax.checkpoint import CheckpointManager
from rlhf_jax.core.errors import UserError
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.models import hf
from rlhf_jax.training.runs import describe_run, load_policy, write_model_files


@dataclasses.dataclass(frozen=True)
class Options:
    """What to convert.

    Attributes:
      source: a Hugging Face folder or a run folder.
      out: the folder to write, of the other kind.
      dtype: of the parameters of a run; that of the files by default.
    """

    source: Path
    out: Path
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


def to_run(options: Options) -> str:
    """Writes a run folder that holds the checkpoint's parameters at step 0."""
    tokenizer = load_tokenizer(options.source)
    config, params = hf.load(options.source, dtype=options.dtype)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{options.source}: the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{config.vocab_size}: they are not of one model."
        )
    write_model_files(options.out, config, tokenizer, "policy")
    describe_run(options.out, {"source": str(options.source), "dtype": options.dtype})
    with CheckpointManager(options.out / "checkpoints") as manager:
        manager.save(0, {"learner": {"params": params}}, wait=True)
    return f"{options.out}: a run, for --init"


def to_hugging_face(options: Options) -> str:
    """Writes the policy of a run as a Hugging Face folder."""
    if options.dtype is not None:
        raise UserError("--dtype is for runs: a run's parameters are exported as they are")
    model = load_policy(options.source)
    hf.save(options.out, model.config, model.params, model.tokenizer)
    return f"{options.out}: {hf.load_config(options.out).architecture}, for transformers and vLLM"


def main() -> None:
    """Parses the command line and converts."""
    options = tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0])
    try:
        if options.source.resolve() == options.out.resolve():
            raise UserError(f"--out is --source ({options.out}): name another folder")
        if (options.source / "model.json").is_file():
            print(to_hugging_face(options))
        else:
            print(to_run(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
