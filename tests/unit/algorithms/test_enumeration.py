"""Expected gradients of the GRPO family, exactly: every group of a toy's answers, weighted by probability.

The toy and the package's gradients of its groups are `tools/tables/gradient_bias.py`'s. What they must be is
written here anew from the papers, as loops over groups, answers and tokens: baselines, scales, reductions and
the place and form of the KL.
"""

import dataclasses
import functools
import itertools
import math
import pathlib

import gradient_bias as tool
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import few

from rlhf_jax.algorithms import grpo_variants

ANSWERS = [(0,), (1, 0), (2, 0), *itertools.product((1, 2), (1, 2), (0, 1, 2))]
PREFIX = {(): 0, (1,): 1, (2,): 2, (1, 1): 3, (1, 2): 4, (2, 1): 5, (2, 2): 6}
G, LONGEST, BETA = 3, 3, 0.3
VARIANTS = grpo_variants.grpo_variants()
PAGE = pathlib.Path(__file__).parents[3] / "docs" / "results" / "gradient_bias.md"


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def toy():
    return tool.make_toy()


def expected(name, **hyper):
    return tool.expectation(tool.gradients(name, toy(), **hyper), toy())


# The toy, from its tables ----------------------------------------------------------------------------


def log_probs(table):
    """Of each token behind each prefix, by dividing."""
    return [[x - math.log(sum(map(math.exp, row))) for x in row] for row in np.asarray(table).tolist()]


def token_logps(table):
    """Of each token of each answer."""
    rows = log_probs(table)
    return [[rows[PREFIX[answer[:t]]][answer[t]] for t in range(len(answer))] for answer in ANSWERS]


def objective(table, beta):
    """J = sum_y p(y) (r(y) - beta log p(y) / ref(y)), which is E[r] - beta KL(pi || ref)."""
    logits = jax.nn.log_softmax(table)
    total = 0.0
    for answer, reward, ref in zip(ANSWERS, toy().rewards, token_logps(toy().ref), strict=True):
        logp = sum(logits[PREFIX[answer[:t]], answer[t]] for t in range(len(answer)))
        total += jnp.exp(logp) * (reward - beta * (logp - sum(ref)))
    return total


# Where the papers have the gradient of an expectation ------------------------------------------------

UNBIASED = {
    "reinforce": 1 - 1 / G,  # one group is the batch, and its mean holds the answer's own reward
    "reinforce_without_baseline": 1.0,
    "rloo": 1.0,
    "remax": 1.0,
    "dr_grpo": (1 - 1 / G) / LONGEST,
    "dppo_tv": (1 - 1 / G) / LONGEST,
    "dppo_kl": (1 - 1 / G) / LONGEST,
    "dro": 1 - 1 / G,
}


@pytest.mark.parametrize("name", few(UNBIASED, "reinforce", "rloo", "dr_grpo"))
@pytest.mark.parametrize("beta", [0.0, BETA])
def test_policy_gradients_climb_the_mean_reward_less_the_kl(name, beta):
    found = expected(name, kl_coef=0.0, reward_kl_coef=beta)
    gradient = jax.grad(objective)(jnp.asarray(toy().old), beta)
    assert np.abs(gradient).max() > 0.1
    np.testing.assert_allclose(found, UNBIASED[name] * gradient, rtol=0, atol=1e-14)


def test_a_kl_in_the_advantage_is_that_of_each_token_with_those_before_held():
    """sum over prefixes of their probability, held, times the KL of what follows."""
    old, ref = np.exp(log_probs(toy().old)), np.asarray(log_probs(toy().ref))
    prefixes = {answer[:t] for answer in ANSWERS for t in range(len(answer))}

    def held_objective(table):
        logits = jax.nn.log_softmax(table)
        total = objective(table, 0.0)
        for prefix in prefixes:
            reached = np.prod([old[PREFIX[prefix[:t]], prefix[t]] for t in range(len(prefix))])
            row = logits[PREFIX[prefix]]
            total -= BETA * reached * jnp.sum(jnp.exp(row) * (row - ref[PREFIX[prefix]]))
        return total

    found = expected("reinforce_without_baseline", kl_coef=0.0, reward_kl_coef=0.0, advantage_kl_coef=BETA)
    gradient = jax.grad(held_objective)(jnp.asarray(toy().old))
    whole = jax.grad(objective)(jnp.asarray(toy().old), BETA)
    np.testing.assert_allclose(found, gradient, rtol=0, atol=1e-14)
    assert np.abs(gradient - whole).max() > 1e-3  # the KL that later tokens will cost is not looked at


def test_max_rl_climbs_the_first_terms_of_the_log_likelihood():
    """log p = -sum_k (1 - p)^k / k, p the probability of a right answer; groups of G see G - 1 terms."""
    right = toy().rewards > 0

    def truncated(table):
        logits = jax.nn.log_softmax(table)
        p = 0.0
        for answer, counts in zip(ANSWERS, right, strict=True):
            if counts:
                p += jnp.exp(sum(logits[PREFIX[answer[:t]], answer[t]] for t in range(len(answer))))
        return -sum((1 - p) ** k / k for k in range(1, G))

    binary = dataclasses.replace(toy(), rewards=np.float64(right))
    found = tool.expectation(tool.gradients("max_rl", binary), binary)
    gradient = jax.grad(truncated)(jnp.asarray(toy().old))
    assert np.abs(gradient).max() > 0.05
    np.testing.assert_allclose(found, gradient, rtol=0, atol=1e-14)


def test_a_star_po_climbs_the_reward_less_the_kl_times_its_beta():
    """The gradient of -(beta L - (r - V*))^2 is 2 beta (r - V* - beta L) grad log pi, and V* drops out."""
    found = expected("a_star_po", surrogate_params={"beta": BETA})
    gradient = jax.grad(objective)(jnp.asarray(toy().old), BETA)
    np.testing.assert_allclose(found, 2 * BETA * gradient, rtol=0, atol=1e-14)


# The others, as sums over groups ---------------------------------------------------------------------


def squared_score(answer, t):
    """|e_y - pi|^2 by the logits of a token."""
    row = np.exp(log_probs(toy().old)[PREFIX[answer[:t]]])
    return float(np.square(np.eye(3)[answer[t]] - row).sum())


def less_mean_weighted_by_paths(rewards, kls, answers):
    """OTB: at each place the mean of the answers that have it, by the sums of their squared scores."""
    paths = [np.cumsum([squared_score(answer, t) for t in range(len(answer))]) for answer in answers]
    advantages = []
    for reward, answer in zip(rewards, answers, strict=True):
        row = []
        for t in range(len(answer)):
            there = [(w[t], r) for w, r in zip(paths, rewards, strict=True) if len(w) > t]
            baseline = sum(w * r for w, r in there) / sum(w for w, _ in there) if len(there) > 1 else 0.0
            row.append(reward - baseline)
        advantages.append(row)
    return advantages


def outside_the_band(rewards, kls, answers, low=0.3, high=5.0):
    """Clip-Cov, where every token of the band is detached."""
    of_answers = standardized(rewards, None)
    logps = [[log_probs(toy().old)[PREFIX[y[:t]]][y[t]] for t in range(len(y))] for y in answers]
    count = sum(map(len, answers))
    mean_logp = sum(map(sum, logps)) / count
    mean = sum(a * len(y) for a, y in zip(of_answers, answers, strict=True)) / count
    return [
        [0.0 if low <= (logp - mean_logp) * (a - mean) <= high else a for logp in row]
        for a, row in zip(of_answers, logps, strict=True)
    ]


def standardized(rewards, lengths):
    mean = sum(rewards) / G
    return [(r - mean) / (math.sqrt(sum((x - mean) ** 2 for x in rewards) / (G - 1)) + 1e-4) for r in rewards]


def centred(rewards, lengths):
    return [r - sum(rewards) / G for r in rewards]


def less_weighted_mean(rewards, lengths):
    baseline = sum(n * r for n, r in zip(lengths, rewards, strict=True)) / sum(lengths)
    return [r - baseline for r in rewards]


def centred_and_whitened(rewards, lengths):
    """The batch is one group, whose centred rewards have mean 0."""
    mean = sum(rewards) / G
    scale = math.sqrt(sum((r - mean) ** 2 for r in rewards) / G + 1e-8)
    return [(r - mean) / scale for r in rewards]


def whitened_returns(rewards, kls, answers):
    """A reward less the KL from each token on, over all tokens of the batch (Hu et al. 2025)."""
    returns = [[r - BETA * sum(kl[t:]) for t in range(len(kl))] for r, kl in zip(rewards, kls, strict=True)]
    every = [x for row in returns for x in row]
    mean = sum(every) / len(every)
    scale = math.sqrt(sum((x - mean) ** 2 for x in every) / len(every) + 1e-8)
    return [[(x - mean) / scale for x in row] for row in returns]


def mean_over_sets(rewards, lengths, k=2, epsilon=1e-6):
    """Of the normalized rewards of all sets of k that hold the answer (Chen et al. 2025, section 3)."""
    sets = list(itertools.combinations(range(G), k))
    passes = [float(any(rewards[i] > 0 for i in members)) for members in sets]
    mean = sum(passes) / len(sets)
    scale = math.sqrt(sum((x - mean) ** 2 for x in passes) / len(sets)) + epsilon
    of_answer = [[(x - mean) / scale for x, s in zip(passes, sets, strict=True) if i in s] for i in range(G)]
    return [sum(values) / len(values) for values in of_answer]


def each_apart(rewards, lengths):
    """Two rewards, 1 above 0 and the rest, each normalized by itself, then their sum (GDPO)."""
    right = [float(r > 0) for r in rewards]
    parts = [right, [r - one for r, one in zip(rewards, right, strict=True)]]
    sums = [sum(pair) for pair in zip(*(standardized(part, lengths) for part in parts), strict=True)]
    return standardized(sums, lengths)


def of_the_two_shortest(rewards, lengths):
    """Mean and deviation are those of the two; the third answer has none (GFPO)."""
    first, second = sorted(range(G), key=lambda i: lengths[i])[:2]
    mean, half = (rewards[first] + rewards[second]) / 2, abs(rewards[first] - rewards[second]) / 2
    return [
        (rewards[i] - mean) / (math.sqrt(2) * half + 1e-4) if i in (first, second) else 0.0 for i in range(G)
    ]


def over_own_length(lengths, rewards):
    return [1 / (G * n) for n in lengths]


def over_tokens(lengths, rewards):
    return [1 / sum(lengths)] * G


def over_answers(lengths, rewards):
    return [1 / G] * G


def over_own_length_of_the_two_that_differ_most(lengths, rewards):
    """The answer nearest to the mean is pruned, with its KL (CPPO)."""
    mean = sum(rewards) / G
    kept = sorted(range(G), key=lambda i: -abs(rewards[i] - mean))[:2]
    return [1 / (2 * lengths[i]) if i in kept else 0.0 for i in range(G)]


BIASED = {
    # name: (advantages, weight of an answer's tokens, where its KL is)
    "opo": (less_weighted_mean, over_answers, "none"),
    "otb": (None, over_answers, "none"),
    "reinforce++": (None, over_tokens, "reward"),
    "reinforce++-baseline": (centred_and_whitened, over_tokens, "loss"),
    "grpo": (standardized, over_own_length, "loss"),  # Shao et al. 2024, eq. 3
    "bnpo": (standardized, over_tokens, "loss"),
    "gpg": (centred, over_tokens, "none"),  # one group: all that differ
    "dapo": (standardized, over_tokens, "none"),  # Yu et al. 2025
    "gspo": (standardized, over_own_length, "none"),  # at ratio 1, Zheng et al. 2025
    "luspo": (standardized, over_answers, "none"),
    "gmpo": (standardized, over_own_length, "none"),
    "cispo": (standardized, over_tokens, "none"),  # MiniMax-M1, eq. 4
    "gspo_token": (standardized, over_own_length, "none"),
    "sapo": (standardized, over_own_length, "none"),
    "vespo": (standardized, over_tokens, "none"),
    "pass_at_k": (mean_over_sets, over_own_length, "loss"),
    "lite_ppo": (standardized, over_tokens, "none"),  # one group is the batch
    "gdpo": (each_apart, over_own_length, "loss"),
    "gfpo": (of_the_two_shortest, over_tokens, "loss"),
    "cppo": (standardized, over_own_length_of_the_two_that_differ_most, "loss"),
    "m2po": (standardized, over_tokens, "none"),
    "clip_cov": (None, over_tokens, "none"),
    "kl_cov": (standardized, over_tokens, "none"),
}
OF_TOKENS = {
    "reinforce++": whitened_returns,
    "otb": less_mean_weighted_by_paths,
    "clip_cov": outside_the_band,
}
"""Advantages of tokens: (rewards, KL of each token, answers) -> a list for each answer."""


def naive_gradient(name):
    """sum over groups of p(group) sum_it weight_i A_it grad log pi(y_it), less beta times that of k3."""
    advantages_of, weights_of, kl_in = BIASED[name]
    logps, ref_logps = token_logps(toy().old), token_logps(toy().ref)
    kls = [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(logps, ref_logps, strict=True)]
    probabilities = [math.exp(sum(row)) for row in logps]
    coefficients = [[0.0] * len(answer) for answer in ANSWERS]
    for group in itertools.product(range(len(ANSWERS)), repeat=G):
        chance = math.prod(probabilities[i] for i in group)
        rewards, lengths = [float(toy().rewards[i]) for i in group], [len(ANSWERS[i]) for i in group]
        if advantages_of is None:
            advantages = OF_TOKENS[name](rewards, [kls[i] for i in group], [ANSWERS[i] for i in group])
        else:
            advantages = [[a] * LONGEST for a in advantages_of(rewards, lengths)]
        for i, weight, of_tokens in zip(group, weights_of(lengths, rewards), advantages, strict=True):
            for t in range(len(ANSWERS[i])):
                push = of_tokens[t]
                if (
                    kl_in == "loss"
                ):  # gradient of exp(l) - 1 - l, l = log ref - log pi, Shao et al. 2024, eq. 4
                    push -= BETA * (1 - math.exp(-kls[i][t]))
                coefficients[i][t] += chance * weight * push
    gradient = np.zeros((len(PREFIX), 3))
    rows = np.exp(log_probs(toy().old))
    for answer, of_tokens in zip(ANSWERS, coefficients, strict=True):
        for t, coefficient in enumerate(of_tokens):
            prefix = PREFIX[answer[:t]]
            gradient[prefix] += coefficient * (np.eye(3)[answer[t]] - rows[prefix])
    return gradient


@pytest.mark.parametrize(
    "name", few(BIASED, "reinforce++", "grpo", "dapo", "gspo", "gfpo", "kl_cov", "vespo")
)
def test_the_others_are_the_weighted_sums_of_their_papers(name):
    _, _, kl_in = BIASED[name]
    found = expected(
        name, kl_coef=BETA if kl_in == "loss" else 0.0, reward_kl_coef=BETA if kl_in == "reward" else 0.0
    )
    assert np.abs(found).max() > 0.02
    np.testing.assert_allclose(found, naive_gradient(name), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_kl_stands_where_the_paper_has_it(name):
    in_reward = {"reinforce++", "rloo", "remax"}
    in_loss = {"grpo", "bnpo", "reinforce++-baseline", "pass_at_k", "gdpo", "gfpo", "cppo"}
    hyper = tool.variant_of(name).hyper
    assert (hyper.kl_coef > 0) == (name in in_loss)
    assert (hyper.reward_kl_coef > 0) == (name in in_reward)


def test_every_variant_has_its_objective_here():
    assert UNBIASED.keys() | BIASED.keys() | {"max_rl", "a_star_po"} == VARIANTS.keys()


# How large the bias is -------------------------------------------------------------------------------

FROZEN = {
    "reinforce": (1, 8.96804600454e-16, 3.0555667127, 0.159210272168),
    "reinforce_without_baseline": (1, 3.3879284906e-15, 3.1646619277, 0.0339957880784),
    "reinforce++": (0.938298270382, 0.267131740439, 1.93756154058, -0.205728906162),
    "reinforce++-baseline": (0.966318517555, 0.170136174855, 2.55490580287, -0.100756845635),
    "rloo": (1, 2.09254406773e-15, 3.0555667127, 0.159210272168),
    "remax": (1, 1.99289911212e-15, 3.72861474865, 0.0927726428227),
    "opo": (0.993596433808, 0.0977111532388, 2.8203920516, 0.0706005686845),
    "grpo": (0.913252257791, 0.339779695961, 1.51387828118, -0.23875813079),
    "bnpo": (0.966353229336, 0.170116573434, 2.55393119355, -0.100427032609),
    "gpg": (0.9947702178661044, 0.08071576829621505, 2.7200559255492425, 0.9984186381141202),
    "dr_grpo": (1, 4.9822477803e-16, 3.0555667127, 0.159210272168),
    "dapo": (0.966353229336, 0.170116573434, 2.55393119355, 0.823967774473),
    "gspo": (0.913252257791, 0.339779695961, 1.51387828118, -0.639842734176),
    "gspo_token": (0.913252257791, 0.339779695961, 1.51387828118, -0.639842734176),
    "luspo": (0.984942305403, 0.124677210188, 2.75968503556, -0.538348457745),
    "gmpo": (0.913252257791, 0.339779695961, 1.51387828118, 0.914364703259),
    "cispo": (0.966353229336, 0.170116573434, 2.55393119355, 0.969555513762),
    "sapo": (0.913252257791, 0.339779695961, 1.51387828118, 0.905669895115),
    "vespo": (0.966353229336, 0.170116573434, 2.55393119355, 0.974456392508),
    "max_rl": (1, 2.8851029212e-15, 6.64182839495, 0.999781815038),
    "pass_at_k": (0.949625743674, 0.380417738806, 61.5464258823, 0.947779732305),
    "lite_ppo": (0.966353229336, 0.170116573434, 2.55393119355, -0.100427032609),
    "gdpo": (0.909740618575, 0.339506311813, 1.48122330136, -0.229301439403),
    "gfpo": (0.876075630296, 0.343117299551, 3.81131811693, -0.332824562954),
    "cppo": (0.922618404117, 0.31882621353, 1.67263338418, -0.0821763832916),
    "dppo_tv": (1, 4.9822477803e-16, 3.0555667127, 0.997510174238),
    "dppo_kl": (1, 4.9822477803e-16, 3.0555667127, 0.997510174238),
    "m2po": (0.966353229336, 0.170116573434, 2.55393119355, 0.969555513762),
    "dro": (1, 7.97159644848e-16, 3.0555667127, 0.951372717405),
    "otb": (0.9995506437983323, 0.0200241440978982, 2.7779911995145423, 0.15258193116365007),
    "clip_cov": (0.9538586802105604, 0.2235840470669506, 2.3075376078609953, 0.9575907762187601),
    "kl_cov": (0.9663532293363776, 0.17011657343436193, 2.5539311935510094, 0.9407854097078188),
    "a_star_po": (0.9999995957506792, 0.000665069237828926, 3.069562267519648, 0.996004127376),
    "rloo, before": (0.943741409716, 0.30395656711, 1.73218134757, 0.0676082141291),
}


@pytest.mark.parametrize("name", [*VARIANTS, "rloo, before"])
def test_bias_and_variance_are_those_of_the_table(name):
    bias = tool.measure(name, toy())
    np.testing.assert_allclose(dataclasses.astuple(bias), FROZEN[name], rtol=0, atol=1e-9)
    said = tool.row(name, bias, "").split("|")[-5:]
    (row,) = [
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |")
    ]
    assert row.split("|")[-5:] == said


def test_the_numbers_of_the_table_by_another_way():
    """RLOO's are those of the exact objective; GRPO's those of the sums above, without the KL."""
    target = np.asarray(jax.grad(objective)(jnp.asarray(toy().old), 0.0))
    np.testing.assert_allclose(tool.true_gradient(toy().old, toy().rewards), target, rtol=0, atol=1e-14)
    mean = naive_gradient("sapo")
    cosine = (mean * target).sum() / np.linalg.norm(mean) / np.linalg.norm(target)
    scaled = mean * (mean * target).sum() / (mean**2).sum()
    found = tool.measure("grpo", toy())
    np.testing.assert_allclose(found.cosine, cosine, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.error, np.abs(scaled - target).max() / np.abs(target).max(), atol=1e-12)


# OPO ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_length_weighted_baseline_is_the_best_where_gradients_grow_with_length():
    """A uniform policy: each token adds the same to the squared norm of grad log pi(y), so that is 2/3 |y|.

    A group that holds each answer as often as it is sampled has the baseline of the expectation.
    """
    uniform = np.zeros((len(PREFIX), 3))
    variant = tool.variant_of("opo")
    group = [i for i, answer in enumerate(ANSWERS) for _ in range(27 // 3 ** len(answer))]
    assert len(group) == 27
    lengths, rewards = np.array([len(ANSWERS[i]) for i in group]), toy().rewards[group]
    best = (lengths * rewards).sum() / lengths.sum()
    assert abs(best - rewards.mean()) > 0.1  # it is not the plain mean

    def second_moment(baseline):
        """E|g|^2 of single answers with a fixed baseline, through the variant's own loss."""
        fixed = dataclasses.replace(
            variant.config, group_size=1, advantage_fn=lambda stats: stats.rewards - baseline
        )
        alone = dataclasses.replace(variant, config=fixed, needs_no_group=True)
        gradient_fn = tool.make_gradient_fn(alone)
        arrays = (uniform, uniform, uniform, toy().rewards, 0.0)
        found = gradient_fn(jnp.asarray(group)[:, None], *map(jnp.asarray, arrays), variant.hyper)
        return float(jnp.mean(jnp.sum(jnp.square(found), axis=(1, 2))))

    at_best = second_moment(best)
    assert at_best < min(second_moment(best + 0.1), second_moment(best - 0.1)) - 1e-4
    np.testing.assert_allclose(second_moment(best + 0.1), second_moment(best - 0.1), rtol=0, atol=1e-12)
    # And that is the baseline the variant takes.
    stats = tool.grpo.compute_advantages(
        dataclasses.replace(variant.config, group_size=27),
        jnp.asarray(rewards),
        jnp.arange(LONGEST) < jnp.asarray(lengths)[:, None],
    )[0]
    np.testing.assert_allclose(stats, rewards - best, rtol=0, atol=1e-12)
