"""The table of off-policy corrections: its gradients against loops over all answers, and its page."""

import math
import pathlib

import corrections as tool
import jax
import numpy as np
import pytest

SCALE = 0.4
PAGE = pathlib.Path(__file__).parents[3] / "docs" / "results" / "corrections.md"


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def token_logps(table, answer):
    """Of each token behind the one before it, the first behind 0."""
    before = (0, *answer[:-1])
    return [table[b][t] - math.log(sum(map(math.exp, table[b]))) for b, t in zip(before, answer, strict=True)]


def token_bound(log_ratios):
    return [min(math.exp(x), 2) for x in log_ratios]


def whole_bound(log_ratios):
    return [min(math.exp(sum(log_ratios)), 2)] * len(log_ratios)


def whole_bound_and_rejected(log_ratios):
    within = math.log(0.5) <= -sum(log_ratios) <= math.log(2)
    return [w if within else 0 for w in whole_bound(log_ratios)]


@pytest.mark.parametrize(
    ("name", "weights_of"),
    [
        ("none", lambda log_ratios: [1] * len(log_ratios)),
        ("tis", token_bound),
        ("seq_is", whole_bound),
        ("seq_is_rs", whole_bound_and_rejected),
    ],
)
def test_expected_gradients_are_those_of_loops_over_all_answers(name, weights_of):
    toy = tool.make_toy()
    policy, sampler = toy.policy.tolist(), toy.sampler(SCALE).tolist()
    rows = np.exp(toy.policy) / np.exp(toy.policy).sum(axis=1, keepdims=True)
    expected, chances = np.zeros((3, 3)), []
    for answer, reward in zip(tool.ANSWERS, toy.rewards, strict=True):
        logps, sampled = token_logps(policy, answer), token_logps(sampler, answer)
        chances.append(math.exp(sum(sampled)))
        weights = weights_of([a - b for a, b in zip(logps, sampled, strict=True)])
        for before, token, weight in zip((0, *answer[:-1]), answer, weights, strict=True):
            expected[before] += chances[-1] * reward * weight * (np.eye(3)[token] - rows[before])
    np.testing.assert_allclose(sum(chances), 1, rtol=1e-12)
    of_answers, _ = tool.gradients(name, toy, SCALE)
    found = np.einsum("n,nij->ij", chances, of_answers)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)
    # And the row of the page is of these numbers.
    (line,) = [x for x in PAGE.read_text(encoding="utf-8").splitlines() if x.startswith(f"| {name} |")]
    assert line == tool.row(name, toy)
    target = tool.true_gradient(toy)
    cosine = (expected * target).sum() / np.linalg.norm(expected) / np.linalg.norm(target)
    place = 2 + tool.SCALES.index(SCALE)
    assert line.split("|")[place].strip().startswith(f"{math.sqrt(max(1 - cosine**2, 0)):.1%},")


def test_the_whole_weight_within_its_bound_has_no_bias():
    """Importance sampling is exact; its bound of 3 does not act here."""
    found = tool.measure("sequence_truncate", tool.make_toy(), SCALE)
    assert found.bias < 1e-12
    assert tool.measure("none", tool.make_toy(), SCALE).bias > 0.3
    assert tool.true_gradient(tool.make_toy()).shape == (3, 3)


def test_every_preset_has_its_row():
    rows = [x.split("|")[1].strip() for x in PAGE.read_text(encoding="utf-8").splitlines() if x[:2] == "| "]
    presets = [name for name in tool.PRESETS if name != "metrics"]
    assert rows[1:] == ["none", *presets]
    assert {name for names in tool.PANELS.values() for name in names} == set(presets)
    drawn = PAGE.with_suffix(".svg").read_text(encoding="utf-8")
    assert [name for name in presets if f">{name}</text>" not in drawn] == []
