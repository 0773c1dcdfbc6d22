"""Bias and variance of every off-policy correction, exactly: every answer of a toy policy is enumerated.

    python tools/tables/corrections.py --out docs/results/corrections.md

Three tokens, of which 0 ends an answer, answers of one to eight tokens, a logit for each token behind each
token: 511 answers. The sampler's logits are the policy's and a fixed direction, times how far off it is.
The gradient of each answer comes from the package's own `make_batch` and `batch_loss`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlhf_jax.algorithms import grpo
from rlhf_jax.algorithms.grpo_variants import GRPOVariant, reinforce_without_baseline, with_correction
from rlhf_jax.core.types import Rollout, Sequences, TokenLogprobs
from rlhf_jax.losses.corrections import PRESETS
from rlhf_jax.metrics.pictures import picture

LENGTH, VOCAB = 8, 3
ANSWERS: list[tuple[int, ...]] = [
    (*body, *end)
    for size in range(LENGTH)
    for body in itertools.product((1, 2), repeat=size)
    for end in ([(0,)] if size < LENGTH - 1 else [(0,), (1,), (2,)])
]
SCALES = (0.02, 0.1, 0.2, 0.4, 0.8)
"""Of the direction in which the sampler's logits differ."""
PANELS = {
    "weights of tokens": ("tis", "mis", "token_truncate", "token_mask", "icepop"),
    "weights of answers": (
        "sequence_truncate",
        "sequence_mask",
        "geometric_truncate",
        "geometric_mask",
        "seq_is",
        "seq_is_rs",
    ),
    "rules": ("geo_rs", "geo_rs_token_tis", "geo_rs_seq_tis", "k3_rs", "k3_rs_token_tis", "k3_rs_seq_tis"),
    "bypass": ("bypass", "bypass_geo_rs", "bypass_k3_rs"),
}
"""Lines of the figure, by panels; none is in each of them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Toy:
    """Tables of logits [token before, token], and what each answer is worth less their mean."""

    policy: np.ndarray
    direction: np.ndarray
    rewards: np.ndarray

    def sampler(self, scale: float) -> np.ndarray:
        """Its logits."""
        return self.policy + scale * self.direction


def make_toy() -> Toy:
    """Right is an answer with more of token 1 than of token 2; the rest is drawn once."""
    rng = np.random.default_rng(0)
    policy, direction = 0.5 * rng.normal(size=(VOCAB, VOCAB)), rng.normal(size=(VOCAB, VOCAB))
    policy[:, 0] -= 1.0  # most answers are long
    right = np.array([float(answer.count(1) > answer.count(2)) for answer in ANSWERS])
    return Toy(policy, direction, right - probabilities(policy) @ right)


def sequences() -> Sequences:
    """All answers, behind a prompt of the one token 0."""
    shape = (len(ANSWERS), 1 + LENGTH)
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, answer in enumerate(ANSWERS):
        tokens[row, 1 : 1 + len(answer)] = answer
        mask[row, 1 : 1 + len(answer)] = True
    positions = np.broadcast_to(np.arange(1 + LENGTH), shape)
    ones = jnp.ones(shape, jnp.int32)
    return Sequences(jnp.asarray(tokens), jnp.asarray(positions), ones, jnp.asarray(mask))


def logprob_fn(table: Any, rows: Sequences) -> TokenLogprobs:
    """A token's row of logits is that of the token before it."""
    log_probs = jax.nn.log_softmax(table)[jnp.roll(rows.tokens, 1, axis=1)]
    logp = jnp.take_along_axis(log_probs, rows.tokens[..., None], axis=-1)[..., 0]
    return TokenLogprobs(logp, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1), jnp.zeros_like(logp))


def answer_logp(table: Any) -> jax.Array:
    """[511], of whole answers."""
    rows = sequences()
    return jnp.sum(jnp.where(rows.mask, logprob_fn(table, rows).logp, 0), axis=1)


def probabilities(table: Any) -> np.ndarray:
    """[511], they sum to 1."""
    return np.asarray(jnp.exp(answer_logp(jnp.asarray(table))))


def true_gradient(toy: Toy) -> np.ndarray:
    """Of E[r] under the policy."""
    return np.asarray(
        jax.grad(lambda table: jnp.sum(jnp.exp(answer_logp(table)) * toy.rewards))(jnp.asarray(toy.policy))
    )


def variant_of(name: str) -> GRPOVariant:
    """The policy gradient with the exact baseline, which the toy's rewards have in them, and a correction."""
    variant = reinforce_without_baseline(group_size=1)
    return variant if name == "none" else with_correction(variant, name)


@functools.cache
def gradient_fn(name: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`gradients(rows, rewards, policy, sampler)`: of each answer, [511, 3, 3], and its share accepted."""
    variant = variant_of(name)

    def of_answer(row: Any, reward: Any, policy: Any, sampler: Any) -> tuple[jax.Array, jax.Array]:
        row = jax.tree.map(lambda leaf: leaf[None], row)
        rollout = Rollout(row, logprob_fn(sampler, row).logp, jnp.ones(1, bool))
        old_logp = logprob_fn(policy, row).logp
        batch, _ = grpo.make_batch(variant.config, variant.hyper, rollout, reward[None], old_logp, None)

        def loss(table: Any) -> jax.Array:
            return grpo.batch_loss(variant.config, variant.hyper, logprob_fn(table, row), batch)[0]

        return -jax.grad(loss)(policy), jnp.sum(batch.sequences.mask) / jnp.sum(row.mask)

    return jax.jit(jax.vmap(of_answer, (0, 0, None, None)))


def gradients(name: str, toy: Toy, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """(gradient of ascent of each answer, [511, 3, 3]; share of its tokens that are accepted, [511])."""
    arrays = map(jnp.asarray, (toy.rewards, toy.policy, toy.sampler(scale)))
    found, accepted = gradient_fn(name)(sequences(), *arrays)
    return np.asarray(found), np.asarray(accepted)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A correction at one distance.

    Attributes:
      bias: norm of the expected gradient less the true one, at the best scale, over that of the true one.
      noise: variance of one answer's gradient, summed over entries, over the square of the expected one.
      accepted: share of the answers' tokens that the rules accept.
    """

    bias: float
    noise: float
    accepted: float


@functools.cache
def measure(name: str, toy: Toy, scale: float) -> Measured:
    """Over answers that the sampler writes."""
    of_answers, accepted = gradients(name, toy, scale)
    chances, target = probabilities(toy.sampler(scale)), true_gradient(toy)
    mean = np.einsum("n,nij->ij", chances, of_answers)
    variance = np.einsum("n,nij->", chances, np.square(of_answers - mean))
    squared = np.sum(np.square(mean))
    if squared == 0:
        return Measured(np.nan, np.nan, float(chances @ accepted))
    scaled = mean * np.sum(mean * target) / squared
    bias = np.sqrt(np.sum(np.square(scaled - target)) / np.sum(np.square(target)))
    return Measured(float(bias), float(variance / squared), float(chances @ accepted))


def divergence(toy: Toy, scale: float) -> float:
    """KL(sampler || policy), in nats an answer."""
    sampler = toy.sampler(scale)
    return float(np.sum(probabilities(sampler) * (answer_logp(sampler) - answer_logp(toy.policy))))


def _cell(found: Measured) -> str:
    if np.isnan(found.bias):
        return "nothing left"
    left = "" if found.accepted > 0.995 else f", {found.accepted:.0%} left"
    return f"{found.bias:.1%}, {found.noise:.0f}{left}"


def row(name: str, toy: Toy) -> str:
    """A row of the table."""
    cells = (_cell(measure(name, toy, scale)) for scale in SCALES)
    return f"| {name} | {' | '.join(cells)} |"


def draw(toy: Toy, path: Path) -> None:
    """Bias, and below it noise, of every correction against the distance."""
    distances = [divergence(toy, scale) for scale in SCALES]

    def show(panel: Any, name: str, **options: Any) -> None:
        found = [measure(name, toy, scale) for scale in SCALES]
        panel[0].plot(distances, [100 * at.bias for at in found], label=name, **options)
        panel[1].plot(distances, [at.noise for at in found], label=name, **options)

    with picture(path, 2, len(PANELS), height=3.6, sharex=True, sharey="row") as grid:
        panels = grid.reshape(2, len(PANELS)).T
        for panel, (title, names) in zip(panels, PANELS.items(), strict=True):
            show(panel, "none", color="black", linewidth=1)
            for name, marker in zip(names, "osv^Dx", strict=False):  # some lie on each other
                show(panel, name, marker=marker, markersize=5, fillstyle="none", alpha=0.8)
            panel[0].set_title(title)
            panel[0].legend(frameon=False, fontsize=7)
            panel[1].set(xscale="log", yscale="log", xmargin=0.04)
        panels[0][0].set_ylabel("bias, %")
        panels[0][1].set_ylabel("noise")
        grid[0].get_figure().supxlabel("KL(sampler, policy), nats an answer")


def page(toy: Toy, picture: str) -> str:
    """The page, in Markdown."""
    distances = [f"{divergence(toy, scale):.2g}" for scale in SCALES]
    head = f"| correction | {' | '.join(f'KL {distance}' for distance in distances)} |\n|{'---|' * 6}"
    rows = "\n".join(row(name, toy) for name in ("none", *PRESETS) if name != "metrics")
    return TEXT.format(head=head, rows=rows, picture=picture)


TEXT = """# Off-policy corrections

What does each correction of `--importance-sampling-correction` mend, and what does it cost?
`python tools/tables/corrections.py` answers exactly, without sampling: a toy policy (three tokens, one of
which ends an answer, answers of one to eight tokens, a logit for each token behind each token) has 511
answers, and the policy gradient of each, with the exact baseline, by the package's own `make_batch` and loss
in float64, is weighted with the probability that the sampler writes it. The sampler's logits differ from the
policy's in a fixed direction; columns are the KL of the sampler to the policy in nats an answer.

Each cell: **bias**, the norm of the difference between the expected gradient and the true one, at the best
scale, over the norm of the true one; **noise**, the variance of one answer's gradient, summed over entries,
over the square of the expected one, which is how many answers make the signal as large as the noise; and what
share of the tokens the rules leave, where they do not leave all.

![Bias and noise of every correction against the KL of the sampler to the policy]({picture})

Above bias, below noise, on a scale of logarithms; where nothing is left there is no point. Lines that lie on
each other are those of equal rows in the table.

{head}
{rows}

The weight of the whole answer has no bias until its bound acts, and bounds trade bias for noise. Weights of
single tokens leave out that the tokens before were drawn by another policy, so a bias stays however wide the
bound. The geometric mean is close to 1 for every answer: as a weight it mends little; as a rule it does not
depend on length. Rules keep the answers on which policy and sampler agree, which are no fair draw: where they
reject much, bias and noise both grow. The bounds of geo_rs, 0.1 % of the ratio, and of k3_rs are made for a
mismatch of numerics; here the policies differ everywhere. In bypass the clip at 0.2 counts from the sampler.

With answers of thousands of tokens the noise of a whole answer's weight grows far beyond what it is here, and
that is what the other corrections are for. The toy says which way each trade goes, not how large it is for a
language model.
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the table.

    Attributes:
      out: the page to write, and beside it its picture.
    """

    out: Path = Path("docs/results/corrections.md")


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    jax.config.update("jax_enable_x64", True)
    toy, curves = make_toy(), options.out.with_suffix(".svg")
    draw(toy, curves)
    options.out.write_text(page(toy, curves.name), encoding="utf-8")
    print(f"Page: {options.out}")
