"""Problems of reasoning-gym as rows, and its verifiers as a reward."""

import importlib.util
import json

import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.data import reasoning_gym
from rlhf_jax.data.sources import read_rows
from rlhf_jax.rewards.verifiers import reasoning_gym_reward

INSTALLED = importlib.util.find_spec("reasoning_gym") is not None
TASKS = "reasoning-gym:gcd+chain_sum?min_terms=2&max_terms=2:5:7"
needs_it = [
    pytest.mark.slow,
    pytest.mark.skipif(not INSTALLED, reason="pip install 'rlhf_jax[reasoning-gym]'"),
]


def with_the_package(function):
    for mark in needs_it:
        function = mark(function)
    return function


def fields_of(rows):
    return {name: [row.fields[name] for row in rows] for name in ("reasoning_gym", "index")}


def test_a_spec_names_generators_settings_count_and_seed():
    gcd, chain = reasoning_gym.parse(TASKS)
    assert (gcd.name, gcd.settings, gcd.count, gcd.seed) == ("gcd", (), 5, 7)
    assert (chain.name, dict(chain.settings)) == ("chain_sum", {"min_terms": 2, "max_terms": 2})
    (alone,) = reasoning_gym.parse("reasoning-gym:gcd")
    assert (alone.count, alone.seed) == (reasoning_gym.COUNT, 0)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("reasoning-gym:", "write reasoning-gym:NAME"),
        ("reasoning-gym:gcd:0", "write reasoning-gym:NAME"),
        ("reasoning-gym:gcd:many", "write reasoning-gym:NAME"),
        ("reasoning-gym:gcd:5:7:9", "write reasoning-gym:NAME"),
        ("reasoning-gym:gcd+", "'' is not of the form NAME"),
        ("reasoning-gym:gcd?terms", "'gcd[?]terms' is not of the form NAME"),
        ("reasoning-gym:gcd?seed=3", "count and seed stand behind the names"),
    ],
)
def test_what_is_no_spec_is_said(spec, said):
    with pytest.raises(UserError, match=said):
        read_rows(spec)


@pytest.mark.skipif(INSTALLED, reason="it is installed")
def test_without_the_package_it_is_said_what_to_install():
    with pytest.raises(UserError, match=r"pip install 'rlhf_jax\[reasoning-gym\]'"):
        read_rows(TASKS)
    with pytest.raises(UserError, match=r"pip install 'rlhf_jax\[reasoning-gym\]'"):
        reasoning_gym_reward(["p"], ["c"], reasoning_gym=["reasoning-gym:gcd:5:7"], index=[0])


@with_the_package
def test_rows_alternate_follow_from_the_seed_and_can_be_written_to_a_file(tmp_path):
    rows = read_rows(TASKS)
    assert [row.where for row in rows[:3]] == [
        "reasoning-gym:gcd:5:7:0",
        "reasoning-gym:chain_sum?min_terms=2&max_terms=2:5:7:0",
        "reasoning-gym:gcd:5:7:1",
    ]
    assert len(rows) == 10
    assert read_rows(TASKS) == rows != read_rows(TASKS.replace(":7", ":8"))
    # Two terms, as the settings say, and the answer that arithmetic gives.
    for row in rows[1::2]:
        problem = row.fields["prompt"].rsplit(": ", 1)[1].removesuffix(" =").removesuffix("?").strip()
        assert eval(problem) == int(row.fields["answer"])
        assert len(problem.split()) == 3
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row.fields) + "\n" for row in rows))
    assert [row.fields for row in read_rows(path)] == [row.fields for row in rows]


@with_the_package
def test_right_answers_are_worth_1_in_tags_or_alone_and_others_are_not():
    rows = read_rows("reasoning-gym:gcd+prime_factorization+letter_counting+chain_sum+products:3:1")
    answers, fields = [row.fields["answer"] for row in rows], fields_of(rows)
    prompts = [row.fields["prompt"] for row in rows]
    for text in ("{}", "<answer>{}</answer>", "Let me think: 1. <answer> {} </answer> So it is."):
        given = [text.format(answer) for answer in answers]
        assert reasoning_gym_reward(prompts, given, **fields) == [1.0] * len(rows), text
    for wrong in ("", "no idea \0 \u2028", "<answer></answer>", "1" * 5000, "-987654321"):
        scores = reasoning_gym_reward(prompts, [wrong] * len(rows), **fields)
        # Some of the package's verifiers give a little for any answer, or for one of the right form.
        assert all(score is not None and score <= 0.1 for score in scores), (wrong, scores)


@with_the_package
@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("reasoning-gym:chain_sums", "no generator 'chain_sums'; did you mean chain_sum"),
        ("reasoning-gym:gcd?terms=3", "gcd does not take {'terms': 3}"),
        ("reasoning-gym:chain_sum?min_terms=9&max_terms=2", "chain_sum does not take"),
    ],
)
def test_what_the_package_does_not_have_is_said(spec, said):
    with pytest.raises(UserError, match=said):
        read_rows(spec)
