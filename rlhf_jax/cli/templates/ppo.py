"""PPO with the loop in sight: sample answers, score, advantages by GAE from a value model, update.

    python mine.py --model runs/sft --reward-model runs/reward_model --data prompts.jsonl --out runs/mine

Rows of the data hold `prompt`, `question` or `messages`; functions may stand beside the reward model.
"""

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms import ppo
from rlhf_jax.checkpoint import CheckpointManager
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import as_path
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.types import Array, Params, Rollout
from rlhf_jax.data.examples import prompt_examples
from rlhf_jax.data.pipeline import BatchSampler
from rlhf_jax.data.sources import read_rows
from rlhf_jax.metrics import JSONLLogger, write_report
from rlhf_jax.rollout.rewards import make_reward_fn
from rlhf_jax.rollout.sampler import make_generate_fn
from rlhf_jax.training.loading import load
from rlhf_jax.training.run_folder import describe_run, load_reward_model, write_model_files


def train(args: argparse.Namespace) -> None:
    """Trains policy and value model, and leaves a run folder."""
    policy = load(args.model)
    reward_fn = make_reward_fn([load_reward_model(args.reward_model)], policy.tokenizer)
    rows = read_rows(args.data)
    prompts = prompt_examples(rows, policy.tokenizer, max_length=args.max_prompt_length, overlength="drop")
    sampler = BatchSampler(len(prompts), args.batch_size, args.seed)
    generate = make_generate_fn(
        policy,
        prompt_length=max(len(prompt.ids) for prompt in prompts),
        max_new_tokens=args.max_new_tokens,
    )

    config = ppo.Config(num_ppo_epochs=args.num_ppo_epochs, num_minibatches=args.num_minibatches)
    hyper = ppo.Hyper(learning_rate=args.learning_rate, kl_coef=args.kl_coef)
    optimizer_steps = args.steps * config.num_ppo_epochs * config.num_minibatches
    tx = make_optimizer(OptimizerConfig("linear", total_steps=optimizer_steps, clip_norm=args.clip_norm))

    # Policy and value model are two decoders; the value model starts from the policy, with a fresh head.
    # The update donates its state, whose buffers are then gone: the frozen reference keeps its own.
    head_key, state_key, key = jax.random.split(jax.random.key(args.seed), 3)
    own, another = (jax.tree.map(jnp.copy, policy.params) for _ in range(2))
    params = {"policy": own, "value": policy.init_scalar_model(head_key, another)}
    logprob_fn, ref_logprob_fn = policy.make_actor_critic_fn(), policy.make_logprob_fn()
    update = jax.jit(ppo.make_update(config, logprob_fn, tx), donate_argnums=0)
    state = ppo.init(params, tx, state_key, hyper)
    reference = policy.params

    @jax.jit
    def make_batch(state: ppo.State, reference: Params, rollout: Rollout, rewards: Array, scored: Array):
        score = logprob_fn(state.learner.all_params, rollout.sequences)
        ref_logp = ref_logprob_fn(reference, rollout.sequences).logp
        return ppo.language_batch(config, state, hyper, rollout, score, ref_logp, rewards, scored=scored)

    write_model_files(args.out, policy, "actor_critic")
    describe_run(args.out, vars(args), stage="ppo")
    checkpoints = CheckpointManager(args.out / "checkpoints")
    # A step is a function of its number and of the state: this goes on with a run that was stopped.
    start, state, _ = checkpoints.restore(state) if checkpoints.steps() else (0, state, None)
    with checkpoints, JSONLLogger(args.out, stage="ppo", resume_step=start or -1) as log:
        for step in range(start, args.steps):
            asked = [prompts[i] for i in sampler.indices(step)]
            rollout = generate(state.learner.all_params["policy"], asked, jax.random.fold_in(key, step))
            scored = reward_fn.score(rollout, asked)
            state, batch, described = make_batch(
                state, reference, rollout, scored.rewards, ~scored.unscorable
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
    parser = argparse.ArgumentParser(description="PPO with the loop in sight.")
    parser.add_argument("--model", required=True, help="run folder, Hugging Face folder or GGUF file")
    parser.add_argument("--reward-model", required=True, help="run folder of a reward model")
    parser.add_argument("--data", required=True, help="rows: .jsonl, .json, .parquet, or tfds:NAME")
    parser.add_argument("--out", required=True, type=as_path, help="run folder to write, or to go on with")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64, help="prompts a step, one answer to each")
    parser.add_argument("--num-ppo-epochs", type=int, default=2, help="passes over each batch")
    parser.add_argument("--num-minibatches", type=int, default=2, help="optimizer steps in each pass")
    parser.add_argument("--max-prompt-length", type=int, default=1024, help="tokens")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--kl-coef", type=float, default=0.05, help="weight of the KL to the reference")
    parser.add_argument("--clip-norm", type=float, default=1.0, help="bound of the gradient's norm")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


if __name__ == "__main__":
    try:
        train(parse())
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
