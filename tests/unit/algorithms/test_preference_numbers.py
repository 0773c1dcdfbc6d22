"""The numbers and modifiers of pair losses through the update, against loops over pairs and tokens."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tabular
from tiers import few

from rlhf_jax import losses
from rlhf_jax.algorithms import preference, unpaired
from rlhf_jax.core.errors import UserError
from rlhf_jax.losses.pair_logps import PairLogps, loss_parameters, traits_of
from rlhf_jax.sweep.hypers import product

LENGTHS = (1, 5, 2, 4)
MASK = (True, True, False, True)
BETA = 0.3


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


# The oracle ----------------------------------------------------------------------------------------


def log_softmax(row):
    return row - math.log(sum(math.exp(x) for x in row))


def answers():
    """The tokens of each pair, chosen and rejected, the prompt's before them."""
    sides = tabular.rows(1, LENGTHS), tabular.rows(2, LENGTHS[::-1])
    return [
        [np.asarray(side.tokens[row])[: 1 + int(side.mask[row].sum())].tolist() for side in sides]
        for row in range(len(LENGTHS))
    ]


def token_logps(table, tokens):
    return [log_softmax(table[a])[b] for a, b in itertools.pairwise(tokens)]


def wpo(table, tokens):
    """How on-policy an answer is: the geometric mean of p(y_t) / sum of p(v)^2."""
    terms = []
    for before, token in itertools.pairwise(tokens):
        probs = [math.exp(x) for x in log_softmax(table[before])]
        terms.append(math.log(probs[token] / sum(p * p for p in probs)))
    return math.exp(sum(terms) / len(terms))


def summed(table, pair, ld_alpha):
    """Log-probs of both answers, the tokens beyond the shorter one counting `ld_alpha`."""
    shorter = min(len(tokens) - 1 for tokens in pair)
    return [
        sum(logp if t < shorter else ld_alpha * logp for t, logp in enumerate(token_logps(table, tokens)))
        for tokens in pair
    ]


def naive(table, rule, *, ld_alpha=1.0, weigh=None):
    """The mean over counted pairs of `rule(log-ratio c, r, log-prob c, r, length c, r)`.

    Args:
      weigh: the table by which pairs are weighed.
    """
    ref = np.asarray(tabular.init(7, jnp.float64)["logits"])
    total = 0.0
    for pair, counts in zip(answers(), MASK, strict=True):
        if counts:
            (pc, pr), (rc, rr) = summed(table, pair, ld_alpha), summed(ref, pair, ld_alpha)
            weight = 1.0 if weigh is None else wpo(weigh, pair[0]) * wpo(weigh, pair[1])
            total += weight * rule(pc - rc, pr - rr, pc, pr, *(len(tokens) - 1 for tokens in pair))
    return total / sum(MASK)


def differences(function, table, step=1e-5):
    """The gradient by central differences."""
    gradient = np.zeros_like(table)
    for place in np.ndindex(table.shape):
        moved = [table.copy(), table.copy()]
        moved[0][place] += step
        moved[1][place] -= step
        gradient[place] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return gradient


def logistic(x, flip=0.0):
    return (1 - flip) * math.log1p(math.exp(-x)) + flip * math.log1p(math.exp(x))


def power(log_u, alpha):
    return (1 - math.exp(-alpha * log_u)) / alpha


# The update ----------------------------------------------------------------------------------------


def half_temperature(params, sequences):
    return tabular.score({**params, "logits": 2 * params["logits"]}, sequences)


def updated(loss_fn, numbers, *, ld_alpha=None, use_weighting=False, micro_batches=1):
    """(loss, gradient, metrics) of one step."""
    params, tx = tabular.init(dtype=jnp.float64), optax.identity()
    half = half_temperature if use_weighting else None
    config = preference.Config(micro_batches, loss_fn, half)
    chosen, rejected = tabular.rows(1, LENGTHS), tabular.rows(2, LENGTHS[::-1])
    ref = tabular.init(7, jnp.float64)
    batch = preference.make_batch(tabular.score, ref, chosen, rejected, jnp.asarray(MASK), ld_alpha)
    hyper = preference.Hyper(1.0, BETA, numbers, ld_alpha)
    update = jax.jit(preference.make_update(config, tabular.score, tx))
    state, metrics = update(preference.init(params, tx, jax.random.key(0)), hyper, batch)
    return metrics["loss"], params["logits"] - state.learner.params["logits"], metrics


def dpo(c, r, *_):
    return logistic(BETA * (c - r))


def js(x):
    return math.log(2 * math.exp(x) / (1 + math.exp(x)))


MIXED = losses.mixed_loss({"dpo": losses.dpo_loss, "simpo": losses.simpo_loss})
CASES = {
    "label_smoothing": (
        losses.dpo_loss,
        {"label_smoothing": 0.2},
        lambda c, r, *_: logistic(BETA * (c - r), 0.2),
        {},
    ),
    "gamma": (
        losses.simpo_loss,
        {"gamma": 1.7, "nll_weight": 0.3},
        lambda c, r, pc, pr, nc, nr: logistic(BETA * (pc / nc - pr / nr) - 1.7) - 0.3 * pc / nc,
        {},
    ),
    "alpha": (
        losses.alpha_po_loss,
        {"alpha": 0.6, "gamma": 0.2},
        lambda c, r, pc, pr, nc, nr: logistic(BETA * (power(pc / nc, 0.6) - power(pr / nr, 0.6)) - 0.2),
        {},
    ),
    "rpo": (
        losses.with_nll(losses.dpo_loss),
        {"rpo_alpha": 0.7},
        lambda c, r, pc, pr, nc, nr: dpo(c, r) - 0.7 * pc / nc,
        {},
    ),
    "forward_kl": (
        losses.with_divergence(losses.dpo_loss, losses.forward_kl_score),
        {},
        lambda c, r, *_: logistic(BETA * (power(c, 1.0) - power(r, 1.0))),
        {},
    ),
    "js": (
        losses.with_divergence(losses.hinge_loss, losses.js_score),
        {},
        lambda c, r, *_: max(0.0, 1 - BETA * (js(c) - js(r))),
        {},
    ),
    "alpha_divergence": (
        losses.with_divergence(losses.dpo_loss, losses.alpha_divergence_score),
        {"alpha": 0.4, "label_smoothing": 0.1},
        lambda c, r, *_: logistic(BETA * (power(c, 0.4) - power(r, 0.4)), 0.1),
        {},
    ),
    "mixed": (
        MIXED,
        {"dpo_weight": 0.8, "simpo_weight": 0.3, "gamma": 0.5, "label_smoothing": 0.1},
        lambda c, r, pc, pr, nc, nr: (
            0.8 * logistic(BETA * (c - r), 0.1) + 0.3 * logistic(BETA * (pc / nc - pr / nr) - 0.5, 0.1)
        ),
        {},
    ),
    "mpo": (
        losses.with_nll(losses.mixed_loss({"dpo": losses.dpo_loss, "bco_pair": losses.bco_pair_loss})),
        {"dpo_weight": 0.8, "bco_pair_weight": 0.2},
        lambda c, r, pc, pr, nc, nr: (
            0.8 * dpo(c, r) + 0.2 * (logistic(BETA * c) + logistic(-BETA * r)) - pc / nc
        ),
        {},
    ),
    "ld": (losses.dpo_loss, {}, dpo, {"ld_alpha": 0.25}),
    "wpo": (losses.dpo_loss, {}, dpo, {"use_weighting": True}),
    "all": (
        losses.with_nll(losses.with_divergence(losses.dpo_loss, losses.js_score)),
        {"rpo_alpha": 0.5},
        lambda c, r, pc, pr, nc, nr: logistic(BETA * (js(c) - js(r))) - 0.5 * pc / nc,
        {"use_weighting": True, "ld_alpha": 0.6},
    ),
}


@pytest.mark.parametrize("name", few(CASES, "alpha_divergence"))
def test_a_step_is_that_of_the_loop_over_pairs(name):
    loss_fn, numbers, rule, options = CASES[name]
    table = np.asarray(tabular.init(dtype=jnp.float64)["logits"])
    weigh = table if options.get("use_weighting") else None
    expected = functools.partial(naive, rule=rule, ld_alpha=options.get("ld_alpha", 1.0), weigh=weigh)
    loss, gradient, metrics = updated(loss_fn, numbers, **options)
    np.testing.assert_allclose(loss, expected(table), rtol=1e-6)
    np.testing.assert_allclose(gradient, differences(expected, table), atol=1e-6)
    split_loss, split_gradient, split_metrics = updated(loss_fn, numbers, micro_batches=2, **options)
    np.testing.assert_allclose(split_loss, loss, rtol=1e-7)
    np.testing.assert_allclose(split_gradient, gradient, atol=1e-9)
    assert split_metrics.keys() == metrics.keys()
    for key, value in metrics.items():
        np.testing.assert_allclose(split_metrics[key], value, rtol=1e-6, atol=1e-9, err_msg=key)


@pytest.mark.parametrize(
    "name", few([name for name, case in CASES.items() if case[1]], "rpo", "alpha_divergence")
)
def test_numbers_are_leaves_that_a_sweep_varies(name):
    loss_fn, numbers, _, options = CASES[name]
    number = next(iter(numbers))
    values = [numbers[number], numbers[number] / 2]
    traces = []

    def loss(hyper):
        traces.append(hyper)
        return updated(loss_fn, dict(hyper.loss_params), **options)[0]

    hypers = product(preference.Hyper(1.0, BETA, numbers), **{number: values})
    together = jax.jit(jax.vmap(loss))(hypers)
    assert len(traces) == 1
    alone = [updated(loss_fn, {**numbers, number: value}, **options)[0] for value in values]
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    assert abs(together[0] - together[1]) > 1e-3 * abs(together[0])


def test_the_weight_of_the_tail_is_a_leaf():
    found = jax.jit(jax.vmap(lambda alpha: updated(losses.dpo_loss, {}, ld_alpha=alpha)[0]))(
        jnp.asarray([0.0, 0.5, 1.0])
    )
    table = np.asarray(tabular.init(dtype=jnp.float64)["logits"])
    np.testing.assert_allclose(found, [naive(table, dpo, ld_alpha=a) for a in (0.0, 0.5, 1.0)], rtol=1e-6)
    np.testing.assert_allclose(found[2], updated(losses.dpo_loss, {})[0], rtol=1e-7)


# What a loss has -----------------------------------------------------------------------------------


def test_numbers_are_those_of_the_signature():
    def own(pairs, *, beta, mask, denominator, margin=0.5, slope):
        del pairs, beta, mask, denominator, margin, slope

    assert set(loss_parameters(own)) == {"margin", "slope"}
    assert loss_parameters(losses.nca_loss) == {}
    assert loss_parameters(functools.partial(losses.simpo_loss, gamma=0.4))["gamma"] == 0.4
    assert set(loss_parameters(MIXED)) == {
        "label_smoothing",
        "gamma",
        "nll_weight",
        "dpo_weight",
        "simpo_weight",
    }


@pytest.mark.parametrize(
    ("loss_fn", "numbers", "said"),
    [
        (losses.dpo_loss, {"gamma": 1.0}, "dpo_loss has no parameter gamma: it has label_smoothing"),
        (losses.nca_loss, {"gamma": 1.0}, "nca_loss has no parameter gamma: it has none but beta"),
        (
            functools.partial(losses.simpo_loss, gamma=1.0),
            {"tau": 1.0},
            "simpo_loss has no parameter tau: it has gamma, label_smoothing, nll_weight",
        ),
        (
            losses.with_divergence(losses.dpo_loss, losses.alpha_divergence_score),
            {},
            "dpo_loss with alpha_divergence_score needs alpha",
        ),
    ],
)
def test_numbers_that_the_loss_does_not_have_are_refused(loss_fn, numbers, said):
    with pytest.raises(UserError, match=said):
        updated(loss_fn, numbers)


def test_what_does_not_go_together_is_refused():
    for loss_fn in (losses.simpo_loss, losses.aot_loss, losses.with_nll(losses.dpo_loss), MIXED):
        with pytest.raises(UserError, match="has no f-divergence"):
            losses.with_divergence(loss_fn, losses.js_score)
    with pytest.raises(UserError, match="WPO"):
        updated(losses.aot_loss, {}, use_weighting=True)
    mixed = losses.mixed_loss({"dpo": losses.dpo_loss, "aot": losses.aot_loss})
    with pytest.raises(UserError, match="WPO"):
        updated(mixed, {}, use_weighting=True)
    with pytest.raises(UserError, match="micro_batches 1"):
        updated(mixed, {}, micro_batches=2)
    with pytest.raises(UserError, match="dpo_weight is a number of both"):
        losses.mixed_loss({"dpo": losses.mixed_loss({"dpo": losses.dpo_loss})})


def test_traits_of_losses_of_losses_are_those_of_their_parts():
    assert traits_of(MIXED).uses_soft_labels
    assert not traits_of(losses.mixed_loss({"nca": losses.nca_loss})).uses_soft_labels
    assert not traits_of(losses.with_divergence(losses.dpo_loss, losses.js_score)).uses_plain_logps


def test_divergences_have_a_place_in_every_loss_but_those_that_see_more_than_log_ratios():
    """Where the reference is moved along with the policy, a loss on log-ratios stays the same.

    The order of the margins changes here, so that a loss that sorts those of each does not.
    """
    pairs = PairLogps(
        *(jnp.asarray(x) for x in ([-3.0, -7.0], [-5.0, -2.0], [-4.0, -6.0], [-4.5, -3.0])),
        jnp.asarray([3, 5]),
        jnp.asarray([2, 6]),
    )
    shift_chosen, shift_rejected = jnp.asarray([-3.5, -0.3]), jnp.asarray([-0.2, -2.0])
    moved = dataclasses.replace(
        pairs,
        policy_chosen=pairs.policy_chosen + shift_chosen,
        ref_chosen=pairs.ref_chosen + shift_chosen,
        policy_rejected=pairs.policy_rejected + shift_rejected,
        ref_rejected=pairs.ref_rejected + shift_rejected,
    )
    for name, loss_fn in preference.pair_losses().items():
        same = np.allclose(loss_fn(pairs, beta=BETA)[0], loss_fn(moved, beta=BETA)[0], rtol=1e-9)
        assert same is not traits_of(loss_fn).uses_plain_logps, name


# BCO's shift ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift_fn", [losses.class_mean_shift, losses.row_mean_shift])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_shift_of_bco_is_the_mean_of_class_means_or_of_rows(shift_fn, micro_batches):
    responses, desirable = tabular.rows(1, LENGTHS), np.asarray([True, False, False, False])
    params, ref = (tabular.init(seed, jnp.float64) for seed in (0, 7))
    config = unpaired.Config(micro_batches, shift_decay=0.75, shift_fn=shift_fn)
    update = jax.jit(unpaired.make_update(config, tabular.score, optax.identity()))
    batch = unpaired.make_batch(tabular.score, ref, responses, jnp.asarray(desirable))
    state = unpaired.init(params, optax.identity(), jax.random.key(0))
    state, _ = update(state, unpaired.Hyper(0.0, BETA), batch)
    rewards = np.asarray(
        [
            BETA * sum(np.subtract(*(token_logps(np.asarray(p["logits"]), pair[0]) for p in (params, ref))))
            for pair in answers()
        ]
    )
    classes = (rewards[desirable].mean() + rewards[~desirable].mean()) / 2
    expected = {losses.class_mean_shift: classes, losses.row_mean_shift: rewards.mean()}[shift_fn]
    np.testing.assert_allclose(state.shift, 0.25 * expected, rtol=1e-5)
    assert abs(classes - rewards.mean()) > 1e-3


def test_a_batch_of_one_class_leaves_the_shift_as_it_is():
    params = tabular.init(dtype=jnp.float64)
    config = unpaired.Config(shift_decay=0.75)
    update = jax.jit(unpaired.make_update(config, tabular.score, optax.identity()))
    state = unpaired.init(params, optax.identity(), jax.random.key(0))
    state = dataclasses.replace(state, shift=jnp.float32(0.3))
    for desirable in (jnp.ones(4, bool), jnp.zeros(4, bool)):
        batch = unpaired.make_batch(
            tabular.score, tabular.init(7, jnp.float64), tabular.rows(1, LENGTHS), desirable
        )
        after, metrics = update(state, unpaired.Hyper(0.0, BETA), batch)
        np.testing.assert_allclose(after.shift, 0.3, rtol=1e-6)
        assert np.isfinite(metrics["loss"])
