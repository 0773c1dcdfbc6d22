"""Bias and variance of the GRPO family's gradients, exactly: every completion of a toy policy is enumerated.

    python tools/tables/gradient_bias.py --out docs/results/gradient_bias.md

Three tokens, of which 0 ends an answer, answers of one to three tokens, a logit for each token behind each
prefix: 15 answers, 3,375 groups of three. The gradient of each group comes from the package's own
`make_batch` and `batch_loss`; weighted by the probability of the group, their sum is the expected gradient.
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlhf_jax.algorithms import grpo
from rlhf_jax.algorithms.grpo_variants import GRPOVariant, grpo_variants, make_variant
from rlhf_jax.core.types import Rollout, Sequences, TokenLogprobs
from rlhf_jax.losses.reductions import sequence_mean

GROUP_SIZE, LENGTH, PREFIXES, VOCAB = 3, 3, 7, 3
ANSWERS: list[tuple[int, ...]] = [(0,), (1, 0), (2, 0), *itertools.product((1, 2), (1, 2), (0, 1, 2))]
GROUPS = np.array([*itertools.product(range(len(ANSWERS)), repeat=GROUP_SIZE)])
MENDED = ("reinforce", "reinforce_without_baseline", "rloo", "remax", "opo")
BEFORE = {name: f"{name}, before" for name in MENDED}
"""Variants that divided answers by their length until it was mended, and what their rows are called."""
PASS_OR_FAIL = ("max_rl", "pass_at_k")
"""Variants for rewards of 0 and 1: here 1 where the toy's reward is above 0."""
CHANGES = {
    "gdpo": {"reward_weights": (1.0, 1.0)},
    "clip_cov": {"clip_cov_fraction": 1.0, "clip_cov_low": 0.3},
    "kl_cov": {"kl_cov_fraction": 1.0},
}
"""What is not as published: weights of two rewards, and shares that a group of a few tokens can have."""
STEP = 1.0
"""Of ascent on E[r], after which the policy that sampled is an old one."""


@dataclasses.dataclass(frozen=True)
class Toy:
    """Tables of logits [prefix, token], and what each answer is worth.

    Attributes:
      greedy_reward: of the most likely answer under the policy that samples.
    """

    old: np.ndarray
    ref: np.ndarray
    rewards: np.ndarray
    greedy_reward: float


def make_toy() -> Toy:
    """Drawn once; all numbers are those of this one."""
    rng = np.random.default_rng(0)
    old, ref = 0.7 * rng.normal(size=(2, PREFIXES, VOCAB))
    rewards = rng.normal(size=len(ANSWERS))
    return Toy(old, ref, rewards, float(rewards[np.argmax(probabilities(old))]))


def toy_of(name: str, toy: Toy) -> Toy:
    """The toy with the rewards that a variant is for."""
    if name not in PASS_OR_FAIL:
        return toy
    return dataclasses.replace(toy, rewards=np.where(toy.rewards > 0, 1.0, 0.0))


def sequences_of(answers: list[tuple[int, ...]]) -> Sequences:
    """Behind a prompt of one token."""
    shape = (len(answers), 1 + LENGTH)
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, answer in enumerate(answers):
        tokens[row, 1 : 1 + len(answer)] = answer
        mask[row, 1 : 1 + len(answer)] = True
    positions = np.broadcast_to(np.arange(1 + LENGTH), shape)
    ones = jnp.ones(shape, jnp.int32)
    return Sequences(jnp.asarray(tokens), jnp.asarray(positions), ones, jnp.asarray(mask))


def logprob_fn(params: Any, sequences: Sequences) -> TokenLogprobs:
    """Prefixes are numbered (), (1), (2), (1, 1), (1, 2), (2, 1), (2, 2)."""
    first, second = sequences.tokens[:, 1], sequences.tokens[:, 2]
    third = jnp.clip(2 * first + second, 0, PREFIXES - 1)
    prefix = jnp.stack([jnp.zeros_like(first), jnp.zeros_like(first), first, third], axis=1)
    log_probs = jax.nn.log_softmax(params)[prefix]
    logp = jnp.take_along_axis(log_probs, sequences.tokens[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
    collision = jnp.sum(jnp.exp(2 * log_probs), axis=-1)
    return TokenLogprobs(logp, entropy, jnp.zeros_like(logp), collision=collision)


def answer_logp(params: Any) -> jax.Array:
    """[15], of whole answers."""
    sequences = sequences_of(ANSWERS)
    return jnp.sum(jnp.where(sequences.mask, logprob_fn(params, sequences).logp, 0), axis=1)


def probabilities(params: Any) -> np.ndarray:
    """[15], they sum to 1."""
    return np.asarray(jnp.exp(answer_logp(jnp.asarray(params))))


def true_gradient(params: Any, rewards: np.ndarray) -> np.ndarray:
    """Of E[r], by differentiating the sum over all answers."""
    return np.asarray(jax.grad(lambda p: jnp.sum(jnp.exp(answer_logp(p)) * rewards))(jnp.asarray(params)))


def terms_of(rewards: Any) -> jax.Array:
    """[15, 2], two rewards whose sum it is: whether an answer is worth more than 0, and the rest (GDPO)."""
    right = jnp.asarray(rewards > 0, rewards.dtype)
    return jnp.stack([right, rewards - right], axis=1)


def make_gradient_fn(variant: GRPOVariant) -> Callable[..., jax.Array]:
    """`gradients(groups, params, old, ref, rewards, greedy_reward, hyper) -> [N, 7, 3]`, of ascent."""

    def of_group(group: Any, params: Any, old: Any, ref: Any, rewards: Any, greedy_reward: Any, hyper: Any):
        sequences = jax.tree.map(lambda leaf: leaf[group], sequences_of(ANSWERS))
        scored = logprob_fn(old, sequences)
        old_logp, ref_logp = scored.logp, logprob_fn(ref, sequences).logp
        of_reference = jnp.sum(jnp.exp(answer_logp(ref) + rewards / hyper.value_beta))
        rollout = Rollout(sequences, old_logp, jnp.ones(group.shape, bool))
        batch, _ = grpo.make_batch(
            variant.config,
            hyper,
            rollout,
            rewards[group],
            old_logp,
            ref_logp,
            greedy_rewards=greedy_reward[None] if variant.needs_greedy else None,
            reward_terms=terms_of(rewards)[group],
            collision=scored.collision,
            values=hyper.value_beta * jnp.log(of_reference)[None],
            key=jax.random.key(0),
        )

        def loss(table: Any) -> jax.Array:
            score = logprob_fn(table, batch.sequences)
            return grpo.batch_loss(variant.config, hyper, score, batch)[0]

        return -jax.grad(loss)(params)

    return jax.jit(jax.vmap(of_group, (0, *6 * (None,))))


@functools.cache
def variant_of(name: str) -> GRPOVariant:
    """A variant by its name, or as it was before (`BEFORE`)."""
    for now, before in BEFORE.items():
        if name == before:
            variant = variant_of(now)
            config = dataclasses.replace(variant.config, reduce=sequence_mean)
            return dataclasses.replace(variant, config=config)
    changes = CHANGES.get(name)
    return make_variant(name, group_size=GROUP_SIZE, max_completion_length=LENGTH, changes=changes)


@functools.cache
def _gradient_fn(name: str) -> Callable[..., jax.Array]:
    return make_gradient_fn(variant_of(name))


def gradients(name: str, toy: Toy, params: Any = None, **hyper: float) -> np.ndarray:
    """Of every group, [3375, 7, 3].

    Args:
      params: the policy that learns; None for the one that samples.
      hyper: in place of the published numbers.
    """
    given = dataclasses.replace(variant_of(name).hyper, **hyper)
    numbers = jax.tree.map(jnp.asarray, given, is_leaf=lambda leaf: isinstance(leaf, tuple))
    arrays = (toy.old if params is None else params, toy.old, toy.ref, toy.rewards, toy.greedy_reward)
    found = _gradient_fn(name)(jnp.asarray(GROUPS), *map(jnp.asarray, arrays), numbers)
    return np.asarray(found)


def expectation(values: np.ndarray, toy: Toy) -> np.ndarray:
    """Over groups that the old policy samples."""
    weights = np.prod(probabilities(toy.old)[GROUPS], axis=1)
    return np.einsum("n,n...->...", weights, values)


@dataclasses.dataclass(frozen=True)
class Bias:
    """How an expected gradient differs from that of E[r].

    Attributes:
      cosine: of the angle between them.
      error: largest entry of their difference, over the largest entry of the true one, at the best scale.
      noise: variance of one group's gradient, summed over its entries, over the square of the expected one.
      old_cosine: `cosine` where the answers are those of the old policy, and bounds act.
    """

    cosine: float
    error: float
    noise: float
    old_cosine: float


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)))


def measure(name: str, toy: Toy) -> Bias:
    """Without the KL, which is no part of E[r]."""
    toy = toy_of(name, toy)
    no_kl = {"kl_coef": 0.0, "reward_kl_coef": 0.0}
    of_groups, target = gradients(name, toy, **no_kl), true_gradient(toy.old, toy.rewards)
    mean = expectation(of_groups, toy)
    variance = np.sum(expectation(np.square(of_groups - mean), toy))
    scaled = mean * np.sum(mean * target) / np.sum(mean * mean)
    moved = toy.old + STEP * target
    off_policy = expectation(gradients(name, toy, moved, **no_kl), toy)
    return Bias(
        cosine=_cosine(mean, target),
        error=float(np.max(np.abs(scaled - target)) / np.max(np.abs(target))),
        noise=float(variance / np.sum(mean * mean)),
        old_cosine=_cosine(off_policy, true_gradient(moved, toy.rewards)),
    )


def gradient_line(name: str) -> str:
    """What the variant's docstring says of its gradient."""
    lines = inspect.getdoc(grpo_variants()[name]) or ""
    (line,) = [line for line in lines.splitlines() if line.startswith("Gradient: ")]
    return line.removeprefix("Gradient: ").rstrip(".")


def row(name: str, bias: Bias, said: str) -> str:
    """A row of a table of the page."""
    numbers = f"{bias.cosine:.4f} | {bias.error:.1%} | {bias.noise:.2f} | {bias.old_cosine:.4f}"
    return f"| {name} | {said} | {numbers} |"


HEAD = (
    "| variant | expected gradient on policy | cosine | error | noise | cosine off policy |\n"
    "|---|---|---|---|---|---|"
)


def page(toy: Toy) -> str:
    """The page, in Markdown."""
    now = [row(name, measure(name, toy), gradient_line(name)) for name in grpo_variants()]
    before = [row(name, measure(name, toy), "biased: answers over their length") for name in BEFORE.values()]
    moved = toy.old + STEP * true_gradient(toy.old, toy.rewards)
    old, new = probabilities(toy.old), probabilities(moved)
    kl = float(np.sum(old * np.log(old / new)))
    return TEXT.format(head=HEAD, now="\n".join(now), before="\n".join(before), kl=kl)


TEXT = """# Bias of the policy gradients

Which objective does each variant of GRPO climb, and how noisy is its gradient?
`python tools/tables/gradient_bias.py` answers exactly, without sampling: a toy policy (three tokens, one of
which ends an answer; answers of one to three tokens; a logit for each token behind each prefix) has 15
answers and 3,375 groups of three, and the gradient of every group, by the package's own `make_batch` and loss
in float64, is weighted with its probability. `tests/unit/algorithms/test_enumeration.py` holds every variant
to its paper's objective, written there as naive sums, and this page to these numbers.

The target is the gradient of E[r], the mean reward of an answer. The KL is left out; in the reward it gives
the gradient of E[r] - kl_coef KL(policy, reference) wherever that of E[r] is unbiased, which the test holds.

- **cosine**: of the angle between the expected gradient and the target.
- **error**: the largest entry of their difference over the largest entry of the target, at the best scale.
- **noise**: the variance of one group's gradient, summed over entries, over the square of the expected one.
- **cosine off policy**: after a step of ascent that moves the policy by {kl:.2f} nats an answer, with answers
  of the old policy and the published bounds.

{head}
{now}

max_rl and pass_at_k, which are for right and wrong answers, have rewards of 1 (above 0 in the toy) and 0, and
are compared with the gradient of the share of right ones. gdpo has the same reward as the sum of two: 1 where
it is above 0, and the rest. gfpo and cppo keep two answers of three. clip_cov detaches all tokens whose
covariance is from 0.3 to 5, and kl_cov holds all: of so few tokens the published shares are none.
a_star_po has the exact optimal value for its baseline, and its beta of 1e-3 in the target's place of 0.

A factor that all answers share, such as 1 - 1/G, changes the length of the gradient and not its direction:
Adam does not see it. Three things change the direction. Answers over their length: a token of a short answer
weighs more. Answers over the batch's tokens: short answers weigh more where they stand beside short ones.
Prompts over the spread of their rewards: groups that differ little weigh more. The papers of GRPO, DAPO and
their kin accept these. The numbers are those of one toy: they say how large such a bias can be, not how large
it is for a language model.

Off policy, ratios of single tokens leave out that the tokens before have moved too, and bounds take
gradients away: those of tokens that have moved far enough as their advantage asks. What is left are tokens
that have moved the other way, so the cosine falls, for several below 0. That is what a bound is for: it ends
the step. DAPO's wider upper bound does so later; CISPO, SAPO, VESPO and GMPO, which bound weights or whole
answers, DPPO, which bounds probabilities, M2PO, which bounds the batch, and DRO, which pulls back, keep the
direction.

## Normalization: what was wrong before

REINFORCE, RLOO, ReMax and OPO divided each answer by its length, as GRPO does, where their papers sum over
its tokens; RLOO and ReMax had GRPO's k3 term in the loss where their papers put the KL into the reward. The
same toy with what was there before:

{head}
{before}
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the table.

    Attributes:
      out: the page to write.
    """

    out: Path = Path("docs/results/gradient_bias.md")


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    jax.config.update("jax_enable_x64", True)
    options.out.write_text(page(make_toy()), encoding="utf-8")
    print(f"Page: {options.out}")
