"""GRPO with the loop in sight: sample a group of answers to each prompt, score, compare, update.

    python mine.py --model runs/sft --data gsm8k.jsonl --out runs/mine

Rows of the data hold `prompt`, `question` or `messages`; their other fields go to the reward by name.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms import grpo
from rlhf_jax.checkpoint import CheckpointManager
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import as_path
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.types import Array, Params, Rollout
from rlhf_jax.data.examples import prompt_examples
from rlhf_jax.data.pipeline import BatchSampler
from rlhf_jax.data.sources import read_rows
from rlhf_jax.metrics import JSONLLogger, write_report
from rlhf_jax.rewards.verifiers import gsm8k_reward
from rlhf_jax.rollout.rewards import make_reward_fn
from rlhf_jax.rollout.sampler import make_generate_fn
from rlhf_jax.training.loading import load
from rlhf_jax.training.run_folder import describe_run, write_model_files


def reward(prompts: Sequence[str], completions: Sequence[str], **fields: Any) -> Any:
    """Reward of each completion: a number for each, or None where it cannot be scored."""
    return gsm8k_reward(prompts, completions, **fields)


def train(args: argparse.Namespace) -> None:
    """Trains the policy, and leaves a run folder."""
    policy = load(args.model)
    rows = read_rows(args.data)
    prompts = prompt_examples(rows, policy.tokenizer, max_length=args.max_prompt_length, overlength="drop")
    sampler = BatchSampler(len(prompts), args.batch_size, args.seed)
    generate = make_generate_fn(
        policy,
        prompt_length=max(len(prompt.ids) for prompt in prompts),
        max_new_tokens=args.max_new_tokens,
        group_size=args.group_size,
    )

    # Further rewards and reward models may stand beside it; the sum counts.
    reward_fn = make_reward_fn([reward], policy.tokenizer)

    # What makes it GRPO: advantages, ratio, surrogate, KL and reduction are fields of the configuration.
    config = grpo.Config(group_size=args.group_size, num_minibatches=args.num_minibatches)
    hyper = grpo.Hyper(learning_rate=args.learning_rate, kl_coef=args.kl_coef)
    logprob_fn = policy.make_logprob_fn()
    optimizer_steps = args.steps * config.num_minibatches
    tx = make_optimizer(OptimizerConfig("linear", total_steps=optimizer_steps, clip_norm=args.clip_norm))
    # The update donates its state, whose buffers are then gone: the frozen reference keeps its own.
    update = jax.jit(grpo.make_update(config, logprob_fn, tx), donate_argnums=0)
    state = grpo.init(jax.tree.map(jnp.copy, policy.params), tx, jax.random.key(args.seed))
    reference = policy.params

    @jax.jit
    def make_batch(params: Params, reference: Params, rollout: Rollout, rewards: Array, scored: Array):
        old_logp = logprob_fn(params, rollout.sequences).logp
        ref_logp = logprob_fn(reference, rollout.sequences).logp
        return grpo.make_batch(config, hyper, rollout, rewards, old_logp, ref_logp, scored=scored)

    write_model_files(args.out, policy, "policy")
    describe_run(args.out, vars(args), stage="grpo")
    key = jax.random.key(args.seed + 1)
    checkpoints = CheckpointManager(args.out / "checkpoints")
    # A step is a function of its number and of the state: this goes on with a run that was stopped.
    start, state, _ = checkpoints.restore(state) if checkpoints.steps() else (0, state, None)
    with checkpoints, JSONLLogger(args.out, stage="grpo", resume_step=start or -1) as log:
        for step in range(start, args.steps):
            asked = [prompts[i] for i in sampler.indices(step) for _ in range(args.group_size)]
            rollout = generate(state.rollout_params, asked, jax.random.fold_in(key, step))
            scored = reward_fn.score(rollout, asked)
            batch, described = make_batch(
                state.learner.all_params, reference, rollout, scored.rewards, ~scored.unscorable
            )
            state, metrics = update(state, hyper, batch)

            log.log({**described, **metrics}, step + 1)
            shown = "  ".join(f"{name} {float(described[name]):.3f}" for name in ("reward", "kl", "length"))
            print(f"step {step + 1}/{args.steps}  {shown}")
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                checkpoints.save(step + 1, state)
    print(f"Report: {write_report(args.out)}")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="GRPO with the loop in sight.")
    parser.add_argument("--model", required=True, help="run folder, Hugging Face folder or GGUF file")
    parser.add_argument("--data", required=True, help="rows: .jsonl, .json, .parquet, or tfds:NAME")
    parser.add_argument("--out", required=True, type=as_path, help="run folder to write, or to go on with")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32, help="prompts a step")
    parser.add_argument("--group-size", type=int, default=8, help="answers to each prompt")
    parser.add_argument("--num-minibatches", type=int, default=1, help="optimizer steps for each batch")
    parser.add_argument("--max-prompt-length", type=int, default=1024, help="tokens")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--kl-coef", type=float, default=0.02, help="weight of the KL to the reference")
    parser.add_argument("--clip-norm", type=float, default=1.0, help="bound of the gradient's norm")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


if __name__ == "__main__":
    try:
        train(parse())
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
