"""DPO with the loop in sight: score a batch of pairs under policy and reference, update.

    python mine.py --model runs/sft --data pairs.jsonl --out runs/mine

Rows of the data hold `prompt`, `chosen` and `rejected`: plain strings, or lists of messages.
"""

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms import preference
from rlhf_jax.checkpoint import CheckpointManager
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import as_path
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.types import Array, Float, Metrics, Params, Scalar, Sequences
from rlhf_jax.data.examples import preference_examples
from rlhf_jax.data.packing import pad_rows
from rlhf_jax.data.pipeline import BatchSampler
from rlhf_jax.data.sources import read_rows
from rlhf_jax.losses.pair_logps import PairLogps
from rlhf_jax.losses.preference import dpo_loss
from rlhf_jax.metrics import JSONLLogger, write_report
from rlhf_jax.training.loading import load
from rlhf_jax.training.run_folder import describe_run, write_model_files


def loss(
    pairs: PairLogps, /, *, beta: Scalar, mask: Array, denominator: Scalar
) -> tuple[Float[Array, ""], Metrics]:
    """-log sigmoid(beta (log-ratio of the chosen - log-ratio of the rejected)); put your own here."""
    return dpo_loss(pairs, beta=beta, mask=mask, denominator=denominator)


def train(args: argparse.Namespace) -> None:
    """Trains the policy, and leaves a run folder."""
    policy = load(args.model)
    pairs = preference_examples(
        read_rows(args.data), policy.tokenizer, max_length=args.max_length, overlength="drop"
    )
    length = max(len(side.ids) for pair in pairs for side in (pair.chosen, pair.rejected))
    chosen = pad_rows([pair.chosen for pair in pairs], length)
    rejected = pad_rows([pair.rejected for pair in pairs], length)
    sampler = BatchSampler(len(pairs), args.batch_size, args.seed)

    hyper = preference.Hyper(learning_rate=args.learning_rate, beta=args.beta)
    logprob_fn = policy.make_logprob_fn()
    tx = make_optimizer(OptimizerConfig("linear", total_steps=args.steps, clip_norm=args.clip_norm))
    # The update donates its state, whose buffers are then gone: the frozen reference keeps its own.
    config = preference.Config(args.micro_batches, loss)
    update = jax.jit(preference.make_update(config, logprob_fn, tx), donate_argnums=0)
    state = preference.init(jax.tree.map(jnp.copy, policy.params), tx, jax.random.key(args.seed))
    reference = policy.params

    @jax.jit
    def make_batch(reference: Params, chosen: Sequences, rejected: Sequences) -> preference.Batch:
        return preference.make_batch(logprob_fn, reference, chosen, rejected)

    write_model_files(args.out, policy, "policy")
    describe_run(args.out, vars(args), stage="dpo")
    checkpoints = CheckpointManager(args.out / "checkpoints")
    # A step is a function of its number and of the state: this goes on with a run that was stopped.
    start, state, _ = checkpoints.restore(state) if checkpoints.steps() else (0, state, None)
    with checkpoints, JSONLLogger(args.out, stage="dpo", resume_step=start or -1) as log:
        for step in range(start, args.steps):
            indices = sampler.indices(step)
            sides = jax.tree.map(lambda x, rows=indices: x[rows], (chosen, rejected))
            state, metrics = update(state, hyper, make_batch(reference, *sides))

            log.log(metrics, step + 1)
            shown = f"loss {float(metrics['loss']):.4f}  accuracy {float(metrics['accuracy']):.3f}"
            print(f"step {step + 1}/{args.steps}  {shown}")
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                checkpoints.save(step + 1, state)
    print(f"Report: {write_report(args.out)}")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="DPO with the loop in sight.")
    parser.add_argument("--model", required=True, help="run folder, Hugging Face folder or GGUF file")
    parser.add_argument("--data", required=True, help="rows: .jsonl, .json, .parquet, or tfds:NAME")
    parser.add_argument("--out", required=True, type=as_path, help="run folder to write, or to go on with")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32, help="pairs a step")
    parser.add_argument("--micro-batches", type=int, default=1, help="parts of a batch, to save memory")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens; longer pairs are dropped")
    parser.add_argument("--beta", type=float, default=0.1, help="strength of the KL constraint")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--clip-norm", type=float, default=1.0, help="bound of the gradient's norm")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


if __name__ == "__main__":
    try:
        train(parse())
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
