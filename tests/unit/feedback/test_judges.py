"""A model as critic, judge and grader."""

import json

import jax
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.data.chat import encode_prompt
from rlhf_jax.data.examples import PromptExample, SupervisedExample
from rlhf_jax.data.packing import pad_rows
from rlhf_jax.feedback import judges
from rlhf_jax.feedback.judges import Proposition
from rlhf_jax.feedback.revisions import make_review_fn
from rlhf_jax.tasks.arithmetic_reviews import CONSTITUTION, PROPOSITIONS, review_tokenizer

PROMPTS, ANSWERS = ["1+2+3+4=?", "1+1+1+1=?", "0+0+0+7=?"], ["1+2=3\n#### 4", "#### 4", ""]


@pytest.fixture(scope="module")
def model():
    tokenizer = review_tokenizer()
    config = models.dense_config(
        vocab_size=tokenizer.vocab_size, width=16, num_layers=1, num_heads=2, num_kv_heads=1
    )
    params = jax.tree.map(lambda x: 4 * x, models.init_params(config, jax.random.key(0)))
    return models.make_policy(config, params, tokenizer)


@pytest.fixture(scope="module")
def choose(model):
    return judges.make_choose_fn(model, ("yes", "no", "A"))


@pytest.mark.slow
def test_a_choice_is_the_models_distribution_where_it_would_speak(model, choose):
    questions = ["no\nyes", "Which is better?\n1+1=?", "A"]
    distribution = models.make_distribution_fn(model.config)
    wanted = []
    for question in questions:
        ids = np.array([*encode_prompt(model.tokenizer, question), 0], np.int32)
        rows = pad_rows([SupervisedExample(ids, np.ones(len(ids), bool), "")], len(ids))
        p = np.exp(distribution(model.params, rows)[0, -1])
        p = p[[model.tokenizer.encode(word)[0] for word in ("yes", "no", "A")]]
        wanted.append(p / p.sum())
    found = choose(questions)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.ptp(found, axis=0).max() > 1e-3
    # Neither company nor order matter.
    np.testing.assert_allclose(choose(questions[:1]), found[:1], atol=1e-6)
    assert choose([]).shape == (0, 3)


def test_choices_that_begin_alike_are_refused(model):
    with pytest.raises(UserError, match="'1st' begin with the same token"):
        judges.make_choose_fn(model, ("1", "2", "1st"))


def test_ratings_are_expected_scores_and_judges_see_the_completion_first(model):
    principle = CONSTITUTION[0]
    rate = judges.make_choose_fn(model, principle.ratings)
    shares = rate([principle.rate(*row) for row in zip(PROMPTS, ANSWERS, strict=True)])
    reward = judges.make_rating_reward(model, [principle, principle])
    np.testing.assert_allclose(
        reward(PROMPTS, ANSWERS, finished=[True] * 3), shares @ [-1, -0.5, 0, 0.5, 1], atol=1e-6
    )
    judge = judges.make_model_judge(model, [principle])
    preferred = judge(PROMPTS, ANSWERS, opponents=ANSWERS[::-1], answer=["1"] * 3)
    pick = judges.make_choose_fn(model, principle.choices)
    asked = [principle.compare(*row) for row in zip(PROMPTS, ANSWERS, ANSWERS[::-1], strict=True)]
    np.testing.assert_allclose(preferred, pick(asked)[:, 0], atol=1e-6)


def test_rules_are_weighted_features(model):
    rules = [
        Proposition("steps", PROPOSITIONS["steps"], weight=2.0),
        Proposition("line", function="rlhf_jax.rewards.rules:answer_line_reward", weight=-1.0),
    ]
    fields = {"finished": [True] * 3}
    features = judges.make_features_fn(rules, model)(PROMPTS, ANSWERS, fields)
    assert features[:, 1].tolist() == [1.0, 1.0, 0.0]
    assert ((features[:, 0] > 0) & (features[:, 0] < 1)).all()
    reward = judges.make_rules_reward(rules, model)
    np.testing.assert_allclose(reward(PROMPTS, ANSWERS, **fields), features @ [2.0, -1.0], atol=1e-6)
    with pytest.raises(UserError, match="there is no grader"):
        judges.make_features_fn(rules, None)


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "unheard of"},
        {"kind": "rating", "model": "nowhere"},
        {"kind": "rules", "propositions": [{"name": "a"}]},
        {"kind": "rules", "propositions": [{"name": "a", "question": "{prompt}"}]},
        {"kind": "rules", "propositions": []},
        {"kind": "rules", "propositions": [{"name": "a", "meaning": "b"}]},
        {"kind": "rules", "propositions": [{"name": "a", "function": "m:f", "weight": float("nan")}]},
        {"kind": "rules", "propositions": [{"name": "a", "function": "m:f", "weight": 10**400}]},
        {"kind": "rules", "propositions": [{"name": "a", "function": ["m:f"]}]},
        {"kind": "rules", "propositions": [{"name": {}, "function": "m:f"}]},
        {"kind": "rules", "propositions": [{"name": "a", "question": "{prompt!z} {answer}"}]},
    ],
)
def test_a_file_that_describes_no_reward_is_refused(tmp_path, data):
    path = tmp_path / "reward.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"reward\.json"):
        judges.load_reward_file(path)
    with pytest.raises(UserError, match=r"missing\.json"):
        judges.load_reward_file(tmp_path / "missing.json")


@pytest.mark.slow
def test_reviews_are_a_function_of_the_prompts_number(model):
    prompts = [PromptExample(np.array([1]), text, {"prompt": text}, text) for text in PROMPTS]
    review = make_review_fn(model, CONSTITUTION, rounds=2, max_new_tokens=4, seed=0)
    whole = review(prompts, 5)
    assert [one.prompt[0]["content"] for one in whole] == PROMPTS
    assert all(len(one.turns) == 2 and one.revision == one.turns[1].revision for one in whole)
    again = review([prompts[1], prompts[2], prompts[0]], 6)
    assert [one.answer for one in again[:2]] == [one.answer for one in whole[1:]]
    assert again[2].answer != whole[0].answer
    assert json.loads(json.dumps(whole[0].row()))["turns"][0]["principle"] == "lines"
