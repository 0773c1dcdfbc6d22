"""Distillation: a teacher behind prompts of its own, moving averages, several teachers, models in chunks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tabular
from tiers import few

from rlhf_jax import losses, models
from rlhf_jax.algorithms import distillation
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Sequences
from rlhf_jax.data.tokenizers import byte_tokenizer

VOCAB = 5
PROMPTS, TEACHER_PROMPTS = [[1, 2, 3], [4]], [[3, 1, 4, 2, 2], [1, 1]]
ANSWERS = [[2, 4, 1], [3, 0]]
P, Q, NEW = 4, 6, 3


def rows(prompts, length):
    """Left-padded prompts, then answers, padded on the right; written down column by column."""
    tokens, positions, segments, mask = (np.zeros((2, length + NEW), int) for _ in range(4))
    for row, (prompt, answer) in enumerate(zip(prompts, ANSWERS, strict=True)):
        for place, token in enumerate(prompt + answer):
            column = length - len(prompt) + place
            tokens[row, column], positions[row, column], segments[row, column] = token, place, 1
            mask[row, column] = place >= len(prompt)
    return Sequences(*map(jnp.asarray, (tokens, positions, segments, mask.astype(bool))))


def teacher_prompts():
    whole = rows(TEACHER_PROMPTS, Q)
    return distillation.TeacherPrompts(whole.tokens[:, :Q], whole.segment_ids[:, :Q] > 0)


def test_completions_stand_behind_the_prompts_of_the_teacher():
    found = distillation.behind_prompts(rows(PROMPTS, P), teacher_prompts(), prompt_length=P)
    expected = rows(TEACHER_PROMPTS, Q)
    for field in dataclasses.fields(Sequences):
        held = (getattr(side, field.name) for side in (found, expected))
        np.testing.assert_array_equal(*held, err_msg=field.name)


def logits_after(prefix):
    """Of a model that looks at all it has read, and at how much that is."""
    return np.sin((1 + np.arange(VOCAB)) * (1 + sum(prefix) + 3 * len(prefix)))


def reading_fn(params, sequences):
    del params
    there = jnp.where(sequences.segment_ids > 0, sequences.tokens, 0)
    read = (jnp.cumsum(there, axis=1) - there + 3 * sequences.positions)[..., None]
    return jax.nn.log_softmax(jnp.sin((1 + jnp.arange(VOCAB)) * (1.0 + read)))


@pytest.mark.parametrize("length", [Q, 2], ids=["longer", "shorter"])
def test_what_the_teacher_says_stands_where_the_student_says_it(length):
    """Each entry against the model on the teacher's prompt and the answer so far, one by one."""
    prompts = TEACHER_PROMPTS if length == Q else [[3, 3], [2]]
    shown = rows(prompts, length)
    shown = distillation.TeacherPrompts(shown.tokens[:, :length], shown.segment_ids[:, :length] > 0)
    label_fn = distillation.over_vocabulary(reading_fn)
    hyper, own = distillation.Hyper(), rows(PROMPTS, P)
    batch = distillation.make_batch(label_fn, None, own, hyper, teacher_prompts=shown, prompt_length=P)
    assert batch.teacher_logp.shape == (*own.tokens.shape, VOCAB)
    for row, answer in enumerate(ANSWERS):
        for place, token in enumerate(answer):
            logits = logits_after(prompts[row] + answer[:place])
            expected = logits - np.log(np.exp(logits).sum())
            assert int(own.tokens[row, P + place]) == token
            np.testing.assert_allclose(batch.teacher_logp[row, P + place], expected, rtol=1e-4, atol=1e-4)


def test_the_teacher_follows_the_policy():
    sequences = tabular.rows(1, (3, 2))
    label_fn = distillation.over_vocabulary(tabular.distribution)
    update = jax.jit(distillation.make_update(distillation.Config(), label_fn, optax.sgd(1.0)))
    hyper = distillation.Hyper(learning_rate=1.0, teacher_update_rate=0.25)
    batch = distillation.make_batch(label_fn, tabular.init(7), sequences, hyper)
    before = distillation.init(tabular.init(), optax.sgd(1.0), jax.random.key(0), ema=True)
    after, _ = update(before, hyper, batch)
    start, end = before.learner.params["logits"], after.learner.params["logits"]
    assert np.abs(end - start).max() > 1e-2
    np.testing.assert_allclose(after.teacher_params["logits"], 0.75 * start + 0.25 * end, rtol=1e-6)
    np.testing.assert_array_equal(dataclasses.replace(after, ema_params=None).teacher_params["logits"], end)


def updated(config, batch, hyper):
    label_fn = distillation.over_vocabulary(tabular.distribution)
    update = jax.jit(distillation.make_update(config, label_fn, optax.sgd(1.0)))
    state = distillation.init(tabular.init(), optax.sgd(1.0), jax.random.key(0))
    state, metrics = jax.jit(update)(state, hyper, batch)
    return state.learner.params["logits"], metrics


def test_a_teacher_of_the_same_tokenizer_is_one_of_another_with_spans_of_one_token():
    sequences, label_fn = tabular.rows(1, (3, 2)), distillation.over_vocabulary(tabular.distribution)
    hyper = distillation.Hyper(learning_rate=1.0, temperature=2.0, hard_label_weight=0.25)
    spans = jnp.where(sequences.mask, jnp.arange(6), -1)
    texts = distillation.TwoTokenizations(sequences, sequences, spans, spans)
    across = distillation.make_cross_tokenizer_batch(label_fn, tabular.init(7), texts, hyper)
    every = np.arange(VOCAB)
    gold = functools.partial(
        losses.gold_loss, student_ids=every, teacher_ids=every, divergence_fn=losses.reverse_kl_loss
    )
    found, metrics = updated(distillation.Config(loss_fn=gold), across, hyper)
    plain = distillation.make_batch(label_fn, tabular.init(7), sequences, hyper)
    expected, _ = updated(distillation.Config(loss_fn=losses.reverse_kl_loss), plain, hyper)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert int(metrics["spans"]) == int(metrics["tokens"]) == 5


def test_spans_in_micro_batches():
    """Two tokens of the student are one of the teacher. Hard labels are a mean over tokens, soft ones over
    spans.
    """
    sequences, label_fn = tabular.rows(1, (3, 2)), distillation.over_vocabulary(tabular.distribution)
    theirs, hyper = tabular.rows(2, (2, 2)), distillation.Hyper(learning_rate=1.0, hard_label_weight=0.5)
    spans = [[-1, 1, 1, 3, -1, -1], [-1, 1, 2, -1, -1, -1]], [[-1, 1, 3, -1, -1, -1], [-1, 1, 2, -1, -1, -1]]
    texts = distillation.TwoTokenizations(sequences, theirs, *map(jnp.array, spans))
    batch = distillation.make_cross_tokenizer_batch(label_fn, tabular.init(7), texts, hyper)
    whole, metrics = updated(distillation.Config(loss_fn=losses.uld_loss), batch, hyper)
    parts, _ = updated(distillation.Config(micro_batches=2, loss_fn=losses.uld_loss), batch, hyper)
    np.testing.assert_allclose(whole, parts, rtol=1e-6, atol=1e-7)
    assert (int(metrics["spans"]), int(metrics["tokens"])) == (4, 5)
    student, teacher = (np.array(jax.nn.softmax(tabular.init(seed)["logits"])) for seed in (0, 7))
    own, other = (np.asarray(side.tokens) for side in (sequences, theirs))
    rest = student[own[0, 1], own[0, 2]]  # the chain rule along the span of two tokens
    pairs = [
        (student[own[0, 0]] * rest, teacher[other[0, 0]]),
        (student[own[0, 2]], teacher[other[0, 1]]),
        (student[own[1, 0]], teacher[other[1, 0]]),
        (student[own[1, 1]], teacher[other[1, 1]]),
    ]
    soft = np.mean([np.abs(np.sort(p) - np.sort(q)).sum() for p, q in pairs])
    assert float(metrics["soft_loss"]) == pytest.approx(float(soft), rel=1e-5)


@pytest.mark.parametrize("average", ["probabilities", "log_probabilities"])
def test_the_mean_of_teachers(average):
    sequences = tabular.rows(1, (3, 2))
    teachers = [tabular.init(seed) for seed in (1, 2)]
    label_fn = distillation.over_vocabulary(tabular.distribution)
    several = distillation.of_several([label_fn] * 2, (1.0, 3.0), average)
    batch = distillation.make_batch(several, teachers, sequences, distillation.Hyper())
    for row, column in zip(*np.nonzero(np.asarray(sequences.mask)), strict=True):
        before = int(sequences.tokens[row, column - 1])
        first, second = (np.exp(np.asarray(t["logits"][before], np.float64)) for t in teachers)
        first, second = first / first.sum(), second / second.sum()
        mean = first / 4 + 3 * second / 4 if average == "probabilities" else first**0.25 * second**0.75
        expected = np.log(mean / mean.sum())
        np.testing.assert_allclose(batch.teacher_logp[row, column], expected, rtol=1e-4, atol=1e-5)


def test_log_probs_of_sampled_tokens_have_no_geometric_mean():
    found = losses.mean_of_teachers(jnp.log(jnp.array([[[0.2]], [[0.4]]])))
    np.testing.assert_allclose(found, np.log([[0.3]]), rtol=1e-6)
    with pytest.raises(UserError, match="needs the whole vocabulary"):
        losses.mean_of_teachers(jnp.zeros((2, 1, 1)), average="log_probabilities")


@pytest.mark.parametrize("kind", few(["ours", "wrapped"], "wrapped"))
def test_top_k_and_candidates_of_a_model_are_those_of_its_distribution(kind):
    tokenizer = byte_tokenizer()
    config = models.dense_config(vocab_size=tokenizer.vocab_size, width=8, num_layers=1, num_heads=2)
    policy = models.make_policy(config, models.init_params(config, jax.random.key(0)), tokenizer)
    if kind == "wrapped":
        policy = models.wrap(policy.logits_fn, policy.params, tokenizer)
    own = rows(PROMPTS, P)

    @jax.jit
    def say(params):
        logp, ids = policy.make_top_k_fn(3)(params, own, 2.0)
        taken, of_tokens = policy.make_candidate_fn()(params, own, ids, 2.0)
        everything = policy.make_distribution_fn(temperature=2.0)(params, own)
        return everything, policy.make_logprob_fn()(params, own).logp, logp, taken, of_tokens

    found = (np.asarray(values)[np.asarray(own.mask)] for values in say(policy.params))
    everything, token_logp, logp, taken, of_tokens = found
    np.testing.assert_allclose(logp, -np.sort(-everything, axis=-1)[:, :3], rtol=1e-5)
    np.testing.assert_allclose(taken, logp, rtol=1e-5)
    np.testing.assert_allclose(of_tokens, token_logp, rtol=1e-5)


def test_the_teacher_s_log_probs_of_the_tokens_that_stand_there():
    tokens = jnp.array([[1, 0, 2]])
    sequences = Sequences(tokens, jnp.arange(3)[None], jnp.ones_like(tokens), tokens >= 0)
    logp = jax.nn.log_softmax(jnp.arange(9.0).reshape(1, 3, 3) ** 0.5)
    expected = [float(logp[0, place, index]) for place, index in enumerate((1, 0, 2))]
    np.testing.assert_allclose(distillation.Batch(sequences, logp).token_logp[0], expected)
    assert distillation.Batch(sequences, logp[..., 0]).token_logp is not None
    assert distillation.Batch(sequences, logp, candidates=tokens[..., None]).token_logp is None
    assert distillation.Batch(sequences, logp, spans=tokens).token_logp is None
