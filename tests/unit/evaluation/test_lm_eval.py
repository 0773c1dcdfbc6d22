"""The harness's three kinds of requests, and its class (a double of it: it is no dependency)."""

import sys
import types

import jax
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.evaluation.lm_eval import HarnessModel, lm_eval_model
from rlhf_jax.tasks.arithmetic import arithmetic_tokenizer


@pytest.fixture(scope="module")
def model():
    tokenizer = arithmetic_tokenizer()
    config = models.dense_config(vocab_size=tokenizer.vocab_size, width=16, num_layers=1, num_heads=2)
    params = jax.tree.map(lambda x: 3 * x, models.init_params(config, jax.random.key(1)))
    return models.make_policy(config, params, tokenizer)


@pytest.fixture(scope="module")
def harness(model):
    return HarnessModel(model, batch_size=4, max_length=16, max_new_tokens=4)


@pytest.mark.slow
def test_what_greedy_decoding_says_is_greedy(harness):
    contexts = ["1+1=", "2+3", "7", "9+9+9=?"]
    options = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    texts = harness.generate_until([(context, options) for context in contexts])
    pairs = [(c, t) for c, t in zip(contexts, texts, strict=True) if t]
    assert pairs
    assert all(greedy for _, greedy in harness.loglikelihood(pairs))
    others = [(context, chr(ord(text[0]) ^ 1) + text[1:]) for context, text in pairs]
    assert not any(greedy for _, greedy in harness.loglikelihood(others))
    # Answers come back in the order of the requests, cut at the stop string.
    stop = texts[0][1:2]
    cut, whole = harness.generate_until([(contexts[0], options | {"until": stop}), (contexts[0], options)])
    assert whole == texts[0]
    assert cut == texts[0][: texts[0].index(stop)]


@pytest.mark.slow
def test_chains_of_likelihoods_add_up(harness):
    text = "1+2=3"
    whole = harness.loglikelihood_rolling([text])[0]
    assert whole == harness.loglikelihood([("", text)])[0][0]
    parts = harness.loglikelihood([(text[:place], text[place:]) for place in (1, 2)] + [("1", "+")])
    assert parts[0][0] == pytest.approx(parts[1][0] + parts[2][0], abs=1e-4)
    long = "1+2=3\n" * 6
    assert harness.loglikelihood_rolling([long, text])[1] == pytest.approx(whole, abs=1e-4)
    # A context loses its beginning where it is too long.
    beyond = harness.loglikelihood([("9" * 50, "1"), ("9" * 15, "1")])
    assert beyond[0] == pytest.approx(beyond[1], abs=1e-4)
    with pytest.raises(UserError, match="tokens to score do not fit 16"):
        harness.loglikelihood([("", "1" * 40)])
    with pytest.raises(UserError, match="'beams' is not known"):
        harness.generate_until([("1", {"beams": 3})])


def test_the_harness_class(model, monkeypatch):
    class LM:
        pass

    fake = types.ModuleType("lm_eval.api.model")
    fake.LM = LM
    with monkeypatch.context() as absent:
        absent.setitem(sys.modules, "lm_eval.api.model", None)
        with pytest.raises(UserError, match="pip install lm_eval"):
            lm_eval_model(model, name="ours")
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.api", types.ModuleType("lm_eval.api"))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", fake)
    adapter = lm_eval_model(model, name="ours", batch_size=4, max_length=16)
    assert isinstance(adapter, LM)
    assert adapter.tokenizer_name == "ours"
    plain, chat = "1+1=", adapter.apply_chat_template([{"role": "user", "content": "1+1="}])
    assert chat.startswith("<|im_start|>user\n1+1=<|im_end|>")
    requests = [types.SimpleNamespace(args=(context, "2")) for context in (plain, chat)]
    (first, _), (second, _) = adapter.loglikelihood(requests)
    assert np.isfinite([first, second]).all()
    assert first != second
    assert np.isfinite(adapter.loglikelihood_rolling([types.SimpleNamespace(args=("1+1=2",))])).all()
