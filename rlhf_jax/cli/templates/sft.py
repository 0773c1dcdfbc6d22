"""Supervised fine-tuning with the loop in sight: take a batch of conversations, update.

    python mine.py --model runs/base --data chat.jsonl --out runs/mine

Rows of the data hold `messages`, `prompt` and `completion`, or `question` and `answer`.
"""

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms import sft
from rlhf_jax.checkpoint import CheckpointManager
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import as_path
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.data.examples import supervised_examples
from rlhf_jax.data.packing import pad_rows
from rlhf_jax.data.pipeline import BatchSampler
from rlhf_jax.data.sources import read_rows
from rlhf_jax.metrics import JSONLLogger, write_report
from rlhf_jax.training.loading import load
from rlhf_jax.training.run_folder import describe_run, write_model_files


def train(args: argparse.Namespace) -> None:
    """Trains the policy, and leaves a run folder."""
    policy = load(args.model)
    examples = supervised_examples(
        read_rows(args.data), policy.tokenizer, max_length=args.max_length, overlength="drop"
    )
    # Only the assistant's tokens count: the mask of a row is False elsewhere.
    rows = pad_rows(examples, max(len(example.ids) for example in examples))
    sampler = BatchSampler(len(examples), args.batch_size, args.seed)

    logprob_fn = policy.make_logprob_fn()
    hyper = sft.Hyper(learning_rate=args.learning_rate)
    tx = make_optimizer(OptimizerConfig("cosine", total_steps=args.steps, clip_norm=args.clip_norm))
    # The update donates its state, whose buffers are then gone: the policy keeps its own.
    update = jax.jit(sft.make_update(sft.Config(args.micro_batches), logprob_fn, tx), donate_argnums=0)
    state = sft.init(jax.tree.map(jnp.copy, policy.params), tx, jax.random.key(args.seed))

    write_model_files(args.out, policy, "policy")
    describe_run(args.out, vars(args), stage="sft")
    checkpoints = CheckpointManager(args.out / "checkpoints")
    # A step is a function of its number and of the state: this goes on with a run that was stopped.
    start, state, _ = checkpoints.restore(state) if checkpoints.steps() else (0, state, None)
    with checkpoints, JSONLLogger(args.out, stage="sft", resume_step=start or -1) as log:
        for step in range(start, args.steps):
            indices = sampler.indices(step)
            batch = jax.tree.map(lambda x, chosen=indices: x[chosen], rows)
            state, metrics = update(state, hyper, batch)

            log.log(metrics, step + 1)
            print(f"step {step + 1}/{args.steps}  loss {float(metrics['loss']):.4f}")
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                checkpoints.save(step + 1, state)
    print(f"Report: {write_report(args.out)}")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Supervised fine-tuning with the loop in sight.")
    parser.add_argument("--model", required=True, help="run folder, Hugging Face folder or GGUF file")
    parser.add_argument("--data", required=True, help="rows: .jsonl, .json, .parquet, or tfds:NAME")
    parser.add_argument("--out", required=True, type=as_path, help="run folder to write, or to go on with")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32, help="conversations a step")
    parser.add_argument("--micro-batches", type=int, default=1, help="parts of a batch, to save memory")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens; longer rows are dropped")
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="at its peak")
    parser.add_argument("--clip-norm", type=float, default=1.0, help="bound of the gradient's norm")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


if __name__ == "__main__":
    try:
        train(parse())
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
