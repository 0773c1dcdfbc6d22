"""Hugging Face folders and GGUF files to run folders, and back; low-rank adapters of PEFT likewise.

    rlhf convert --source ~/Llama-3.2-1B --out runs/llama      # then: rlhf sft --model runs/llama ...
    rlhf convert --source runs/dpo --out exported              # loads in transformers and vLLM
    rlhf convert --source runs/dpo --out dpo.gguf --outtype q8_0   # for llama.cpp and Ollama
    rlhf convert --source runs/lora --out adapter --adapter    # loads in peft, on its base
    rlhf convert --source adapter --base runs/llama --out runs/lora

A folder with model.json is a run; its policy is written (of PPO, the actor). A folder with config.json and
safetensors is a Hugging Face checkpoint; its tokenizer comes along, as does that of a GGUF file. A folder
with adapter_config.json is an adapter of PEFT; it becomes a run that stands on the run of its base. Where
--out ends in .gguf, a GGUF file is written of any of them but adapters.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from rlhf_jax.checkpoint import CheckpointManager
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import partition
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.models import hf, make_policy
from rlhf_jax.models.adapters import is_trained
from rlhf_jax.models.gguf_writing import Outtype
from rlhf_jax.models.hf import peft
from rlhf_jax.models.loading import kind_of_checkpoint, load_checkpoint, local_checkpoint
from rlhf_jax.training.loading import load
from rlhf_jax.training.run_folder import (
    Adaptation,
    describe_run,
    load_policy,
    load_unmerged_policy,
    write_model_files,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Conversion options.

    Attributes:
      source: a run folder, a Hugging Face folder, a GGUF file, or the name of a model.
      out: the folder to write, of the other kind; or a file whose name ends in .gguf.
      dtype: of the parameters of a run; None for that of the files, and for float32 of a GGUF file's.
      outtype: of the matrices in a GGUF file; None for f16. Q4 keeps embeddings and output matrix in Q8_0.
      adapter: write the run's low-rank adapter alone rather than the model with it.
      base: the run on which an adapter of PEFT stands; None for a whole model.
    """

    source: Path
    out: Path
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    outtype: Outtype | None = None
    adapter: bool = False
    base: Path | None = None


def to_run(options: Options) -> str:
    """Writes a run folder that holds the checkpoint's parameters at step 0."""
    source = local_checkpoint(options.source)
    if kind_of_checkpoint(source) == "gguf":
        config, params, tokenizer = load_checkpoint(source, param_dtype=options.dtype)
    else:
        tokenizer = load_tokenizer(source)
        config, params = hf.load(source, dtype=options.dtype)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{options.source}: the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{config.vocab_size}: they are not of one model."
        )
    write_model_files(options.out, make_policy(config, params, tokenizer), "policy")
    describe_run(options.out, {"source": str(options.source), "dtype": options.dtype})
    with CheckpointManager(options.out / "checkpoints") as manager:
        manager.save(0, {"learner": {"params": params}}, wait=True)
    return f"{options.out}: a run, for --model"


def adapter_to_run(options: Options) -> str:
    """Writes a run folder that holds an adapter of PEFT at step 0, on the run of its base."""
    if options.base is None:
        raise UserError(f"{options.source} is an adapter: name the run that it stands on with --base")
    model = load_policy(options.base)
    assert model.source is not None
    adapter, params = peft.load(options.source, model.architecture, model.params)
    trained = partition(params, is_trained(adapter))[0]
    adaptation = Adaptation(adapter, model.source)
    write_model_files(options.out, model, "policy", adaptation)
    describe_run(options.out, {"source": str(options.source), "base": str(options.base)})
    with CheckpointManager(options.out / "checkpoints") as manager:
        manager.save(0, {"learner": {"params": trained}}, wait=True)
    return f"{options.out}: an adapter on {options.base}, for --model"


def to_hugging_face(options: Options) -> str:
    """Writes the policy of a run as a Hugging Face folder."""
    if options.dtype is not None:
        raise UserError("--dtype is for runs: a run's parameters are exported as they are")
    if options.adapter:
        model, adaptation = load_unmerged_policy(options.source)
        rank_stabilized = adaptation is not None and getattr(adaptation.adapter, "rank_stabilized", False)
        peft.save(options.out, model.architecture, model.params, rank_stabilized=rank_stabilized)
        return f"{options.out}: an adapter, for peft and vLLM"
    model = load_policy(options.source)
    model.save(options.out)
    return f"{options.out}: {hf.load_config(options.out).architecture}, for transformers and vLLM"


def to_gguf(options: Options) -> str:
    """Writes a policy, wherever it is, as a GGUF file."""
    if options.adapter or options.base is not None:
        raise UserError("a GGUF file holds a whole model: leave out --adapter and --base, or another --out")
    if options.dtype is not None:
        raise UserError("--dtype is for runs: --outtype says what a GGUF file's matrices are")
    load(options.source).save(options.out, outtype=options.outtype)
    return f"{options.out}: {options.outtype or 'f16'}, for llama.cpp and Ollama"


def run(options: Options) -> None:
    """Converts, in the direction that the source tells.

    Raises:
      UserError: source and target are the same folder, or the source cannot be read.
    """
    if files.resolved(options.source) == files.resolved(options.out):
        raise UserError(f"--out is --source ({options.out}): name another folder")
    if options.out.suffix == ".gguf":
        print(to_gguf(options))
        return
    if options.outtype is not None:
        raise UserError(f"--outtype is for GGUF files, and --out {options.out} does not end in .gguf")
    if files.is_file(options.source / "model.json"):
        print(to_hugging_face(options))
    elif files.is_file(options.source / "adapter_config.json"):
        print(adapter_to_run(options))
    else:
        print(to_run(options))
