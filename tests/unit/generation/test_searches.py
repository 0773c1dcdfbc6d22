"""Beam, contrastive, DoLa: exhaustive search on a toy, and what `transformers` finds on a checkpoint."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.generation import (
    Sampling,
    beam_search,
    contrast_layers,
    contrastive_search,
    dola_fns,
    generate,
    processors,
)
from rlhf_jax.generation.processors import Context
from rlhf_jax.models import hf

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "golden"
# Small programs that run once: they are compiled quickly rather than well.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TOY_PROMPT, EOS, PAD, STEPS = (2, 3), 1, 0, 4
GOLDEN_EOS, NEW = 4, 16


@functools.cache
def golden():
    with np.load(GOLDEN / "generation_transformers.npz") as arrays:
        return dict(arrays)


@functools.cache
def checkpoint():
    return hf.load(GOLDEN / "hf_llama")


# Beams ---------------------------------------------------------------------------------------------


def toy_beams(toy, **options):
    prompts = jnp.array([TOY_PROMPT, (4, 2)])
    search = jit(
        lambda params: beam_search(
            toy.prefill,
            toy.decode,
            params,
            prompts,
            prompts > 0,
            max_new_tokens=STEPS,
            eos_id=EOS,
            pad_id=PAD,
            **options,
        )
    )
    rollout, scores = search(toy.table)
    rows = zip(*jax.device_get((rollout.sequences.tokens, rollout.sequences.mask)), strict=True)
    answers = [tuple(row[kept].tolist()) for row, kept in rows]
    count = scores.shape[1]
    return [answers[:count], answers[count:]], np.asarray(scores), rollout


def softmax(logits):
    weights = np.exp(logits - np.max(logits))
    return weights / weights.sum()


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_beam_as_wide_as_the_tree_is_exhaustive_search(toy, length_penalty):
    answers, scores, rollout = toy_beams(
        toy, beams=5**STEPS, best=10, length_penalty=length_penalty, early_stopping="never"
    )
    for found, score, prompt in zip(answers, scores, (TOY_PROMPT, (4, 2)), strict=True):
        every = toy.enumerate(prompt, STEPS, lambda logits, _: softmax(logits))
        ranked = sorted(every, key=lambda t: -np.log(every[t]) / len(t) ** length_penalty)[:10]
        assert found == ranked
        expected = [np.log(every[t]) / len(t) ** length_penalty for t in ranked]
        np.testing.assert_allclose(score, expected, rtol=1e-5)
    mask = np.asarray(rollout.sequences.mask)
    total = np.where(mask, rollout.logp, 0).sum(axis=1) / mask.sum(axis=1) ** length_penalty
    np.testing.assert_allclose(total, scores.reshape(-1), rtol=1e-5)
    ends = [answer[-1] == EOS for found in answers for answer in found]
    np.testing.assert_array_equal(rollout.finished, ends)


def test_one_beam_is_greedy(toy):
    """Up to what ends: a beam keeps what goes on beside it."""
    answers, _, _ = toy_beams(toy, beams=1, sampling=Sampling(bias=processors.token_bias(5, banned=(EOS,))))
    for found, prompt in zip(answers, (TOY_PROMPT, (4, 2)), strict=True):
        history = [*prompt]
        for _ in range(STEPS):
            logits = np.array(toy.table)[history[-2], history[-1]]
            logits[EOS] = -np.inf
            history.append(int(np.argmax(logits)))
        assert found[0] == tuple(history[2:])


def test_groups_take_different_ways(toy):
    alike, _, _ = toy_beams(toy, beams=2, groups=3, best=6)
    apart, _, _ = toy_beams(toy, beams=2, groups=3, best=6, diversity_penalty=5.0)
    for same, different in zip(alike, apart, strict=True):
        assert len(set(same)) == 2
        assert len({answer[0] for answer in different}) > len({answer[0] for answer in same})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("beam_plain", {"beams": 4, "best": 4}, marks=pytest.mark.slow),
        pytest.param(
            "beam_short",
            {"beams": 3, "best": 3, "length_penalty": 0.0, "early_stopping": True},
            marks=pytest.mark.slow,
        ),
        ("beam_long", {"beams": 5, "best": 2, "length_penalty": 2.0, "early_stopping": "never"}),
        pytest.param("beam_wide", {"beams": 24, "best": 24, "length_penalty": 0.6}, marks=pytest.mark.slow),
        (
            "diverse",
            {"beams": 2, "groups": 3, "best": 6, "diversity_penalty": 0.7, "eos_id": -1},
        ),
    ],
)
def test_beams_are_those_of_transformers(name, options):
    config, params = checkpoint()
    prefill, decode = models.make_decode_fns(config)
    expected = golden()
    search = jit(
        lambda params: beam_search(
            prefill,
            decode,
            params,
            expected["prompt"],
            expected["prompt_mask"],
            **{"max_new_tokens": NEW, "eos_id": GOLDEN_EOS, "pad_id": PAD, **options},
        )
    )
    rollout, scores = search(params)
    np.testing.assert_array_equal(rollout.sequences.tokens[:, 12:], expected[name])
    np.testing.assert_allclose(scores.reshape(-1), expected[f"{name}_scores"], rtol=1e-4)


# Rules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "process"),
    [
        ("top_k", lambda x, _: processors.top_k(x, 7)),
        ("top_p", lambda x, _: processors.top_p(x, 0.8)),
        ("min_p", lambda x, _: processors.min_p(x, 0.05)),
        ("typical_p", lambda x, _: processors.typical_p(x, 0.7)),
        ("repetition", lambda x, context: processors.repetition_penalty(x, context, 1.3)),
    ],
)
def test_rules_are_those_of_transformers(name, process):
    expected = golden()
    tokens = jnp.asarray(expected["sampler_tokens"])
    context = Context(tokens, jnp.ones((6, 4), bool), jnp.full(6, 5))
    found = jit(process)(jnp.asarray(expected["sampler_logits"]), context)
    np.testing.assert_allclose(found, expected[name], rtol=1e-6)


# Contrastive ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_k", "alpha"), [(4, 0.6), pytest.param(8, 0.3, marks=pytest.mark.slow)])
def test_contrastive_search_is_that_of_transformers(top_k, alpha):
    config, params = checkpoint()
    expected = golden()

    @jit
    def search(params, alpha):
        return contrastive_search(
            *models.make_hidden_decode_fns(config),
            params,
            expected["prompt"],
            expected["prompt_mask"],
            max_new_tokens=NEW,
            eos_id=GOLDEN_EOS,
            pad_id=PAD,
            top_k=top_k,
            alpha=alpha,
        )

    found = search(params, alpha)
    np.testing.assert_array_equal(found.sequences.tokens[:, 12:], expected[f"contrastive_{top_k}_{alpha}"])
    score = jit(models.make_logprob_fn(config))(params, found.sequences)
    np.testing.assert_allclose(found.logp, jnp.where(found.sequences.mask, score.logp, 0), atol=1e-4)


def test_more_candidates_than_there_are_tokens_are_all_of_them():
    config, params = checkpoint()
    tokens = jnp.ones((1, 4), jnp.int32)
    search = functools.partial(contrastive_search, *models.make_hidden_decode_fns(config), max_new_tokens=NEW)
    run = functools.partial(search, eos_id=GOLDEN_EOS, pad_id=PAD, top_k=1000, alpha=0.6)
    assert config.vocab_size < 1000
    assert jax.eval_shape(run, params, tokens, tokens > 0).sequences.tokens.shape == (1, 4 + NEW)


# DoLa ----------------------------------------------------------------------------------------------


def test_contrast_is_with_the_layer_of_the_greatest_divergence():
    logits = 2 * np.random.default_rng(0).standard_normal((4, 5, 9))
    found = np.asarray(jit(functools.partial(contrast_layers, relative_top=0.2))(jnp.asarray(logits)))
    chosen = set()
    for row, column in enumerate(np.moveaxis(logits, 1, 0)):
        probs = np.array([softmax(layer) for layer in column])
        middle = (probs + probs[-1]) / 2
        both = [
            np.sum(p * np.log(p / m)) + np.sum(probs[-1] * np.log(probs[-1] / m))
            for p, m in zip(probs[:-1], middle, strict=False)
        ]
        chosen.add(int(np.argmax(both)))
        expected = np.log(probs[-1] / probs[np.argmax(both)])
        expected[probs[-1] < 0.2 * probs[-1].max()] = -np.inf
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-5)
    assert len(chosen) > 1


@pytest.mark.parametrize("layer", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_dola_is_that_of_transformers(layer):
    config, params = checkpoint()
    expected = golden()
    prefill, decode = dola_fns(*models.make_layer_decode_fns(config, (layer,)))

    @jit
    def search(params):
        return generate(
            prefill,
            decode,
            params,
            expected["prompt"],
            expected["prompt_mask"],
            jax.random.key(0),
            max_new_tokens=NEW,
            eos_id=GOLDEN_EOS,
            pad_id=PAD,
            sampling=Sampling(temperature=0.0),
        )

    np.testing.assert_array_equal(search(params).sequences.tokens[:, 12:], expected[f"dola_{layer}"])


@pytest.mark.slow
def test_layers_of_a_scanned_model_are_those_of_an_unrolled_one():
    config = models.dense_config(vocab_size=11, width=8, num_layers=3, num_heads=2, scan_layers=True)
    params = models.init_params(config, jax.random.key(0))
    tokens = jnp.array([[3, 4, 5, 6]])
    rest = jnp.arange(4)[None], jnp.ones((1, 4), int), 6
    prefill, decode = models.make_layer_decode_fns(config, (0, 2))
    plain_prefill, plain_decode = models.make_decode_fns(config)

    @jit
    def both(params):
        logits, cache = prefill(params, tokens, *rest)
        whole, plain_cache = plain_prefill(params, tokens, *rest)
        token, position = jnp.array([7]), jnp.array([4])
        after, _ = decode(params, cache, token, position)
        return logits, whole, after, plain_decode(params, plain_cache, token, position)[0]

    logits, whole, after, plain = both(params)
    np.testing.assert_allclose(logits[-1], whole, atol=1e-5)
    embedded = models.logits(config, params, params["embedding"][tokens[:, -1]])
    np.testing.assert_allclose(logits[0], embedded, atol=1e-5)
    np.testing.assert_allclose(after[-1], plain, atol=1e-5)
    assert after.shape == (3, 1, 11)
