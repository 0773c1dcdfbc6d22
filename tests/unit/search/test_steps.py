"""Written solutions as states: proposals, left-padding, values, prefixes; against plain lists."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.types import Rollout, Sequences
from rlhf_jax.search import interface, steps, tree

PAD, EOS, END = 0, 1, 2
ROOM, WAYS, LENGTH = 14, 6, 4
PROMPTS = [[5, 6, 7], [8]]


def make_generate(vocab=4, least=1):
    """Samples LENGTH tokens of `least` ... vocab, each of a known logp; ends at END as a sampler would."""

    def generate(tokens, mask, key):
        count, width = tokens.shape
        new = jax.random.randint(key, (count, LENGTH), least, vocab + 1)
        before = jnp.cumsum(new == END, axis=1) - (new == END)
        sampled = before == 0
        there = jnp.concatenate([mask, sampled], axis=1)
        sequences = Sequences(
            jnp.concatenate([tokens, jnp.where(sampled, new, PAD)], axis=1),
            jnp.cumsum(there, axis=1) - 1,
            there.astype(jnp.int32),
            jnp.concatenate([jnp.zeros_like(mask), sampled], axis=1),
        )
        logp = jnp.concatenate([jnp.full((count, width), jnp.nan), -0.1 * new], axis=1)
        return Rollout(sequences, logp, jnp.any(new == END, axis=1))

    return generate


def roots():
    width = max(map(len, PROMPTS))
    tokens = np.array([[PAD] * (width - len(p)) + p for p in PROMPTS])
    return steps.init_solution(jnp.asarray(tokens), jnp.asarray(tokens != PAD), room=ROOM)


def text(state):
    """Prompt and solution as lists."""
    tokens, length, written = (np.asarray(x) for x in (state.tokens, state.length, state.written))
    rows = [row[len(row) - n :].tolist() for row, n in zip(tokens, length, strict=True)]
    return [(row[: len(row) - n], row[len(row) - n :]) for row, n in zip(rows, written, strict=True)]


def make_propose(branching_factor=WAYS, vocab=4):
    return steps.make_propose_fn(
        make_generate(vocab), branching_factor=branching_factor, step_length=LENGTH, end_ids=[END], eos_id=EOS
    )


def test_candidates_are_the_samples_cut_and_merged():
    state, generate, propose = roots(), make_generate(), jax.jit(make_propose())
    for round_ in range(4):
        key = jax.random.key(round_)
        repeated = jax.tree.map(lambda x: jnp.repeat(x, WAYS, axis=0), state)
        rollout = generate(repeated.tokens, steps.text_mask(repeated), key)
        samples = np.asarray(rollout.sequences.tokens)[:, state.tokens.shape[1] :].reshape(2, WAYS, LENGTH)
        before = text(state)
        found = propose(state, key)
        for row in range(2):
            expected = []
            for sample in samples[row].tolist():
                ends = [place for place, token in enumerate(sample) if token in (EOS, END)]
                expected.append((sample[: ends[0] + 1] if ends else sample, bool(ends)))
            after = text(jax.tree.map(lambda x, row=row: x[row], found.states))
            for way, (step, ended) in enumerate(expected):
                same = [k for k, (other, _) in enumerate(expected) if other == step]
                assert bool(found.mask[row, way]) == (same[0] == way)
                assert int(found.count[row, way]) == len(same)
                assert after[way] == (before[row][0], before[row][1] + step)
                assert bool(found.states.done[row, way]) == (not ended or step[-1] == EOS)
                assert bool(found.states.failed[row, way]) == (not ended)
                np.testing.assert_allclose(found.logp[row, way], -0.1 * sum(step), rtol=1e-5)
                total = state.logp[row] - 0.1 * sum(step)
                np.testing.assert_allclose(found.states.logp[row, way], total, rtol=1e-5)
            assert int(found.cost[row]) == sum(len(step) for step, _ in expected)
        going = np.asarray(found.mask & ~found.states.done)
        if not going.any(axis=1).all():
            continue
        state = interface.gather(found.states, jnp.asarray(going.argmax(axis=1)))


def test_a_text_without_room_fails():
    never_ends = make_generate(vocab=3, least=END)
    propose = steps.make_propose_fn(
        never_ends, branching_factor=1, step_length=LENGTH, end_ids=[END], eos_id=EOS
    )
    many = jax.tree.map(lambda x: jnp.repeat(x, 50, axis=0), roots())
    state, cost = interface.follow(propose, steps.is_done, many, jax.random.key(0), steps=ROOM + 1)
    assert bool(jnp.all(state.done & state.failed))
    assert bool(jnp.all(state.length <= state.tokens.shape[1]))
    assert bool(jnp.all((cost > 0) & (cost <= ROOM + 2 + LENGTH)))


def solution(*lines):
    """One solution behind the first prompt, and its step ends."""
    written = [token for line in lines for token in line]
    tokens = [PAD] * (ROOM + 3 - len(PROMPTS[0]) - len(written)) + PROMPTS[0] + written
    return jax.tree.map(
        lambda x: jnp.asarray(x)[None],
        steps.Solution(
            np.array(tokens),
            np.array(3 + len(written)),
            np.array(len(written)),
            np.array(-1.0),
            np.array(written[-1:] == [EOS]),
            np.array(False),
        ),
    )


def doubts_nines(sequences):
    """A judge to whom a step is wrong where the token before its end is 9."""
    before = jnp.pad(sequences.tokens[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(before == 9, -2.0, 3.0)


def test_values_and_trusted_prefixes():
    right, wrong, ending = [4, END], [9, END], [3, EOS]
    evaluate = steps.make_process_value_fn(doubts_nines, end_ids=[END])
    chance = {True: 1 / (1 + np.exp(-3.0)), False: 1 / (1 + np.exp(2.0))}
    for lines, kept in (
        ([right, right, ending], 3),
        ([right, wrong, right, ending], 1),
        ([wrong, right], 0),
        ([right, right, wrong], 2),
        ([], 0),
    ):
        state = solution(*lines)
        judged = [line is not wrong for line in lines if line[-1] == END]
        value, cost = evaluate(state, jax.random.key(0))
        np.testing.assert_allclose(value, np.prod([chance[each] for each in judged]), rtol=1e-5)
        assert float(cost[0]) == 0
        prefix = steps.trusted_prefix(state, doubts_nines, [END])
        assert text(prefix) == [(PROMPTS[0], [token for line in lines[:kept] for token in line])]
        assert bool(prefix.done[0]) == (lines[-1:] == [ending] and kept == len(lines))
    outcome = steps.make_outcome_value_fn(doubts_nines)
    assert float(outcome(solution(right), jax.random.key(0))[0][0]) == 0  # it has not ended
    np.testing.assert_allclose(
        outcome(solution(right, [9, EOS]), jax.random.key(0))[0], chance[False], rtol=1e-5
    )


def test_the_policy_is_asked_for_values():
    """Behind the text, left-padded as before, with positions that go on."""
    question, yes, no = [7, 8], 3, 4

    def next_logits(sequences):
        there = sequences.segment_ids > 0
        assert sequences.tokens.shape[1] == ROOM + 3 + len(question)
        total = jnp.sum(jnp.where(there, sequences.tokens, 0), axis=1)
        last = sequences.positions[:, -1] + 1
        return jnp.stack([total, total, last, 0.1 * total, 0.1 * last], axis=1)

    evaluate = steps.make_prompted_value_fn(next_logits, question, yes=yes, no=no)
    value, cost = evaluate(solution([4, END]), jax.random.key(0))
    total, length = sum([5, 6, 7, 4, END, *question]), 3 + 2 + len(question)
    np.testing.assert_allclose(value, 1 / (1 + np.exp(-0.1 * (total - length))), rtol=1e-5)
    assert float(cost[0]) == 1
    failed = dataclasses.replace(solution([4, END]), failed=jnp.array([True]))
    assert float(evaluate(failed, jax.random.key(0))[0][0]) == 0


@pytest.mark.slow
def test_beams_avoid_what_the_judge_doubts_and_thoughts_are_rewritten():
    generate = make_generate(vocab=9)
    propose = steps.make_propose_fn(
        generate, branching_factor=8, step_length=LENGTH, end_ids=[END], eos_id=EOS
    )
    evaluate = steps.make_process_value_fn(doubts_nines, end_ids=[END])

    @jax.jit
    def search(key):
        start = jax.tree.map(lambda x: jnp.repeat(x, 20, axis=0), roots())
        beam = tree.breadth_first(
            propose, tree.value_scorer(evaluate), steps.is_done, start, key, beam_width=2, depth=3
        )
        alone = steps.make_propose_fn(
            generate, branching_factor=1, step_length=LENGTH, end_ids=[END], eos_id=EOS
        )
        ends, _ = interface.follow(alone, steps.is_done, start, key, steps=3)
        rewrite = steps.make_rewrite_fn(propose, doubts_nines, [END], depth=3)
        again, _ = rewrite(ends, key)
        pairs = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), ends)
        joined, _ = steps.make_join_fn(propose, doubts_nines, [END], depth=3)(pairs, key)
        prefixes = [steps.trusted_prefix(each, doubts_nines, [END]) for each in (ends, joined)]
        kept = [jnp.where(prefix.failed, -1, prefix.written) for prefix in prefixes]
        start_of = jnp.where(prefixes[1].failed, joined.written, prefixes[1].written)
        return beam, again, evaluate(beam.states, key)[0], evaluate(ends, key)[0], kept[0], start_of

    beam, again, by_beam, by_sample, of_ends, of_joined = search(jax.random.key(0))
    assert float(jnp.mean(by_beam)) > float(jnp.mean(by_sample)) + 0.3
    for prompt, written in text(again):
        assert prompt in PROMPTS
        assert len(written) <= ROOM + 2
    assert (np.asarray(of_joined) >= np.asarray(of_ends).reshape(-1, 2).max(axis=1)).all()
    assert bool(jnp.all(beam.cost > 0))
