"""GRPO with a calculator: sums too large for the head, and a policy that learns to call a tool for them.

    rlhf tool-use --out runs/tool_use
    rlhf tool-use --out runs/more --model runs/tool_use/sft --steps 60
    rlhf tool-use --out runs/turns --model runs/tool_use/sft --max-turns 4 --constrained

The first trains a small decoder on demonstrations, in two thirds of which the writer guesses instead of
calling the calculator, and then lets GRPO find out what pays: of held-out problems the most likely
conversation solves 0 % before, never calling, and 91 % after, always calling, in under four minutes on
two CPU cores. Rollouts have several turns: a call is parsed and run, what the calculator says is fed
back as tokens without a gradient, and generation goes on.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlhf_jax.algorithms import grpo
from rlhf_jax.core.files import write_json
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer, with_total_steps
from rlhf_jax.core.types import Array, Float, Params, Rollout
from rlhf_jax.data.examples import PromptExample, prompt_examples
from rlhf_jax.data.pipeline import BatchSampler
from rlhf_jax.data.sources import Row
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.generation import Sampling, regex_automaton
from rlhf_jax.rewards.functions import score_rows
from rlhf_jax.rewards.verifiers import exact_answer_reward
from rlhf_jax.rollout.multi_turn import (
    conversation_texts,
    last_turn_texts,
    make_multi_turn_fn,
    make_sample_fn,
    tool_tokens,
)
from rlhf_jax.rollout.sampler import GenerateFn
from rlhf_jax.rollout.samples import Sample
from rlhf_jax.stages import common, embedded, inputs, sft
from rlhf_jax.tasks.arithmetic import prompt_rows
from rlhf_jax.tasks.arithmetic_tools import TOOL_LEVEL, tool_demonstration_rows, tool_tokenizer
from rlhf_jax.tool_use import calculator, call_pattern
from rlhf_jax.training import run_loop
from rlhf_jax.training.loading import load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of GRPO with tools.

    Attributes:
      model: run folder of the policy to start from, which is also the reference; empty to train one first.
      sft_steps: optimizer steps of supervised fine-tuning, where there is no `model`.
      demonstrations: how many conversations it learns from.
      call_rate: share of the demonstrators who call the calculator; the others guess.
      prompt_count: problems to train on.
      eval_count: held-out problems.
      samples: problems whose conversations before and after are kept in samples.json.
      batch_size: problems a step.
      group_size: conversations about each.
      micro_batches: parts in which a batch is computed, to save memory.
      max_turns: the model's turns in a conversation.
      max_new_tokens: of a turn.
      response_length: tokens of all turns, what the calculator says included.
      learning_rate: at its peak.
      constrained: let the policy write no call that cannot be run.
      temperature: of sampling; the scorer uses the same.
      kl_coef: weight of the KL to the reference in the loss.
    """

    run: tyro.conf.OmitArgPrefixes[common.RunOptions] = common.RunOptions(Path("runs/tool_use"), steps=40)
    arch: common.ArchOptions = common.ArchOptions()
    optimizer: OptimizerConfig = OptimizerConfig("linear", warmup_steps=3, b2=0.99, epsilon=1e-4)
    model: str = ""
    sft_steps: int = 600
    demonstrations: int = 8_000
    call_rate: float = 0.35
    prompt_count: int = 4_000
    eval_count: int = 128
    samples: int = 8
    batch_size: int = 16
    group_size: int = 8
    micro_batches: int = 1
    max_turns: int = 3
    max_new_tokens: int = 24
    response_length: int = 72
    learning_rate: float = 3e-4
    constrained: bool = False
    temperature: float = 1.0
    kl_coef: float = 0.01


def train_sft(options: Options) -> str:
    """The run folder of a policy that has learnt from demonstrations."""
    out, run = options.run.out / "sft", options.run
    data = options.run.out / "demonstrations.json"
    rows = tool_demonstration_rows(TOOL_LEVEL, options.demonstrations, run.seed, call_rate=options.call_rate)
    write_json(data, rows)
    tool_tokenizer().save(options.run.out / "tokenizer")
    stage = sft.Options(
        run=dataclasses.replace(run, out=out, steps=options.sft_steps, eval_every=0, report=False),
        arch=options.arch,
        data=str(data),
        **embedded.FROM_SCRATCH,
        tokenizer=str(options.run.out / "tokenizer"),
    )
    sft.run(common.brief(stage))
    return str(out)


def load_prompts(options: Options, tokenizer: Tokenizer) -> tuple[list[PromptExample], list[PromptExample]]:
    """Problems to train on, and held-out ones."""

    def examples(split: Any, count: int) -> list[PromptExample]:
        rows = prompt_rows(TOOL_LEVEL, split, count, options.run.seed)
        named = [Row(row, f"{split}:{number}") for number, row in enumerate(rows, start=1)]
        return prompt_examples(named, tokenizer, max_length=inputs.UNBOUNDED)

    return examples("train", options.prompt_count), examples("heldout", options.eval_count)


def score(tokenizer: Tokenizer, rollout: Rollout, prompts: Sequence[PromptExample]) -> np.ndarray:
    """1 where the last turn is exactly the answer, else 0."""
    texts = last_turn_texts(tokenizer, rollout)
    fields = {
        "answer": [prompt.fields["answer"] for prompt in prompts],
        "finished": np.asarray(rollout.finished).tolist(),
    }
    return score_rows(exact_answer_reward, [prompt.text for prompt in prompts], texts, fields).rewards


def make_evaluate_fn(
    generate: GenerateFn, tokenizer: Tokenizer, prompts: Sequence[PromptExample], sampling: Sampling
) -> Callable[[Params], tuple[dict[str, float], list[Sample]]]:
    """`evaluate(params) -> (numbers, conversations)` of the most likely conversations."""
    greedy = dataclasses.replace(sampling, temperature=0.0)

    def evaluate(params: Params) -> tuple[dict[str, float], list[Sample]]:
        rollout = generate(params, prompts, jax.random.key(0), greedy)
        rewards = score(tokenizer, rollout, prompts)
        texts = conversation_texts(tokenizer, rollout)
        conversations = [
            Sample(prompt.text, prompt.fields["answer"], text, float(reward))
            for prompt, text, reward in zip(prompts, texts, rewards, strict=True)
        ]
        numbers = {
            "score": float(np.mean(rewards)),
            "tool_use": float(np.mean(jnp.any(tool_tokens(rollout), axis=1))),
            "finished": float(np.mean(rollout.finished)),
        }
        return numbers, conversations

    return evaluate


def run(options: Options) -> None:
    """Trains, and leaves a run folder."""
    common.check(options, options.run, "tool_use")
    rows = options.batch_size * options.group_size
    common.check_divides("--micro-batches", options.micro_batches, "--batch-size x --group-size", rows)
    model = load(options.model or train_sft(options))
    train, held_out = load_prompts(options, model.tokenizer)
    common.announce(options.run, model, f"{len(train):,} problems, a calculator")

    tools = [calculator()]
    constraint = regex_automaton(model.tokenizer, call_pattern(tools)) if options.constrained else None
    sampling = Sampling(temperature=options.temperature, constraint=constraint)
    generate = make_multi_turn_fn(
        make_sample_fn(model, max_new_tokens=options.max_new_tokens),
        model.tokenizer,
        tools,
        prompt_length=max(len(prompt.ids) for prompt in train + held_out),
        max_new_tokens=options.max_new_tokens,
        max_turns=options.max_turns,
        response_length=options.response_length,
        sampling=sampling,
    )
    evaluate = make_evaluate_fn(generate, model.tokenizer, held_out, sampling)
    logprob_fn = model.make_logprob_fn(temperature=options.temperature)
    tx = make_optimizer(with_total_steps(options.optimizer, options.run.num_steps))
    config = grpo.Config(options.group_size, micro_batches=options.micro_batches)
    update = grpo.make_update(config, logprob_fn, tx)
    hyper = grpo.Hyper(learning_rate=jnp.float32(options.learning_rate), kl_coef=options.kl_coef)
    ref_params = model.params

    def learn(state: grpo.State, ref_params: Params, rollout: Rollout, rewards: Float[Array, " B"]):
        old_logp = logprob_fn(state.learner.params, rollout.sequences).logp
        ref_logp = logprob_fn(ref_params, rollout.sequences).logp
        batch, described = grpo.make_batch(config, hyper, rollout, rewards, old_logp, ref_logp)
        state, metrics = update(state, hyper, batch)
        described["tool_use"] = jnp.mean(jnp.any(tool_tokens(rollout), axis=1))
        return state, {**described, **metrics}

    learn = jax.jit(learn, donate_argnums=0)
    sampler = BatchSampler(len(train), options.batch_size, options.run.seed)
    rollout_key, meter = jax.random.key(options.run.seed + 1), options.run.meter()

    def step(state: grpo.State, number: int):
        chosen = [train[i] for i in np.repeat(sampler.indices(number), options.group_size)]
        key = jax.random.fold_in(rollout_key, number)
        rollout = meter.timed("rollout", generate, state.learner.params, chosen, key)
        with meter.timing("reward"):
            rewards = jnp.asarray(score(model.tokenizer, rollout, chosen))
        return meter.timed("update", learn, state, ref_params, rollout, rewards)

    scores, before = evaluate(ref_params)
    if not options.run.quiet:
        print(
            f"Before: {scores['score']:.1%} of held-out problems right, {scores['tool_use']:.1%} with a call"
        )
    common.start(options, options.run, "tool_use", model, "policy")
    state = run_loop(
        grpo.init(common.copied(model.params), tx, jax.random.key(options.run.seed)),
        step,
        options.run.loop(),
        stage="tool_use",
        folder=options.run.out,
        resume=options.run.resume,
        run_config=common.to_json(options),
        loggers=common.loggers(options, "tool_use"),
        eval_fn=lambda state, _: evaluate(state.learner.params)[0],
        meter=meter,
    )
    _, after = evaluate(state.learner.params)
    kept = slice(options.samples)
    common.finish(options.run, inputs.before_and_after("tool_use", before[kept], after[kept]))
