"""What holds of every update: micro-batches, skipped steps, padding, one compilation, vmap over `Hyper`."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular
from tiers import few

from rlhf_jax import losses
from rlhf_jax.algorithms import distillation, grpo, ppo, preference, reward, sft, unpaired
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.types import Sequences
from rlhf_jax.losses.reductions import constant_length, sequence_mean, token_mean

ROWS = 8
LENGTHS = (1, 5, 2, 4, 3, 3, 5, 1)
TX = make_optimizer(OptimizerConfig(clip_norm=0.5, weight_decay=0.1))


def preference_rows(dtype):
    del dtype
    return tabular.rows(1, LENGTHS), tabular.rows(2, LENGTHS[::-1])


def dirty(rng, mask, dtype):
    """Random where something counts, NaN elsewhere."""
    return jnp.asarray(np.where(mask, rng.normal(size=mask.shape), np.nan), dtype)


def policy_arrays(dtype):
    """(sequences, old log-probs, reference log-probs), a little off the policy."""
    sequences, rng = tabular.rows(1, LENGTHS), np.random.default_rng(3)
    logp = tabular.score(tabular.init(0, dtype), sequences).logp
    return (sequences, *(logp + 0.2 * dirty(rng, sequences.mask, dtype) for _ in range(2)))


def sft_case(dtype, **config):
    update = jax.jit(sft.make_update(sft.Config(reduce=sequence_mean, **config), tabular.score, TX))
    return update, sft.Hyper(), tabular.rows(1, LENGTHS)


def reward_case(dtype, **config):
    update = jax.jit(reward.make_update(reward.Config(**config), tabular.reward, TX))
    margin = jnp.linspace(0, 1, ROWS, dtype=dtype)
    return update, reward.Hyper(margin=0.1), reward.Pairs(*preference_rows(dtype), margin=margin)


def ranking_case(dtype, loss_fn=losses.all_pairs_loss, slots=3, **config):
    """Up to three answers to each prompt; those that are missing, in any slot, have a score of NaN."""
    rng = np.random.default_rng(6)
    mask = np.arange(ROWS)[:, None] % 4 != np.arange(slots)
    mask[:, 3:] = False
    answers = tuple(
        dataclasses.replace(rows, positions=jnp.where(mask[:, slot, None], rows.positions, -1))
        for slot, rows in enumerate(tabular.rows(seed, LENGTHS) for seed in range(slots))
    )
    ranks = np.concatenate([rng.permuted(np.tile(np.arange(3), (ROWS, 1)), axis=1), 0 * mask[:, 3:]], axis=1)
    margin = jnp.linspace(0, 1, ROWS, dtype=dtype)
    batch = reward.Rankings(answers, jnp.asarray(ranks, jnp.int32), jnp.asarray(mask), margin)
    update = jax.jit(reward.make_update(reward.Config(loss_fn=loss_fn, **config), tabular.reward, TX))
    return update, reward.Hyper(margin=0.1), batch


def plackett_luce_case(dtype, **config):
    return ranking_case(dtype, losses.plackett_luce_loss, **config)


def preference_case(dtype, **config):
    update = jax.jit(preference.make_update(preference.Config(**config), tabular.score, TX))
    chosen, rejected = preference_rows(dtype)
    return (
        update,
        preference.Hyper(loss_params={"label_smoothing": 0.1}, ld_alpha=0.5),
        preference.make_batch(tabular.score, tabular.init(7, dtype), chosen, rejected, ld_alpha=0.5),
    )


def unpaired_case(dtype, shift_decay=None, **config):
    config = unpaired.Config(shift_decay=shift_decay, **config)
    update = jax.jit(unpaired.make_update(config, tabular.score, TX))
    responses, mismatched = preference_rows(dtype)
    desirable = jnp.arange(ROWS) % 3 > 0
    mismatched = mismatched if shift_decay is None else None
    ref = tabular.init(7, dtype)
    batch = unpaired.make_batch(tabular.score, ref, responses, desirable, mismatched)
    return update, unpaired.Hyper(beta=1.0), batch


def bco_case(dtype, **config):
    return unpaired_case(dtype, shift_decay=0.9, **config)


def distillation_case(dtype, **config):
    label_fn = distillation.over_vocabulary(tabular.distribution)
    update = jax.jit(distillation.make_update(distillation.Config(**config), label_fn, TX))
    hyper = distillation.Hyper(temperature=2.0, hard_label_weight=0.3)
    sequences = tabular.rows(1, LENGTHS)
    return update, hyper, distillation.make_batch(label_fn, tabular.init(7, dtype), sequences, hyper)


def top_k_distillation_case(dtype, **config):
    def top_k(params, sequences, temperature):
        return jax.lax.top_k(jax.nn.log_softmax(tabular.distribution(params, sequences) / temperature), 2)

    def candidates(params, sequences, token_ids, temperature):
        logp = tabular.distribution(params, sequences)
        taken = jnp.take_along_axis(jax.nn.log_softmax(logp / temperature), token_ids, axis=-1)
        return taken, tabular.score(params, sequences).logp

    label_fn = distillation.over_top_k(top_k, candidates)
    update = jax.jit(distillation.make_update(distillation.Config(**config), label_fn, TX))
    hyper = distillation.Hyper(temperature=2.0, hard_label_weight=0.3)
    sequences = tabular.rows(1, LENGTHS)
    return update, hyper, distillation.make_batch(label_fn, tabular.init(7, dtype), sequences, hyper)


def ppo_case(dtype, **config):
    sequences, old_logp, _ = policy_arrays(dtype)
    rng, mask = np.random.default_rng(4), np.asarray(sequences.mask)
    arrays = [dirty(rng, mask, dtype) for _ in range(3)]
    config = ppo.Config(num_ppo_epochs=1, num_minibatches=1, **config)
    update = jax.jit(ppo.make_update(config, tabular.score, TX))
    hyper = ppo.Hyper(entropy_coef=0.01, epsilon_low=0.1)
    return update, hyper, ppo.Batch(sequences, sequences.mask, old_logp, *arrays)


def ptx_case(dtype, **config):
    """PPO with text in the mini-batch, of other lengths than the answers, some of which are imitated."""
    _, hyper, batch = ppo_case(dtype)
    batch = dataclasses.replace(batch, positive=jnp.arange(ROWS) % 3 == 1)
    config = ppo.Config(num_ppo_epochs=1, num_minibatches=1, **config)
    update = jax.jit(ppo.make_update(config, tabular.score, TX, tabular.score))
    together = lambda state, hyper, both: update(state, hyper, *both)  # noqa: E731
    hyper = dataclasses.replace(hyper, ptx_coef=0.5, positive_lm_coef=0.3)
    return together, hyper, (batch, tabular.rows(9, LENGTHS[3:] + LENGTHS[:3]))


def group_case(dtype, reduce=sequence_mean, **config):
    sequences, old_logp, ref_logp = policy_arrays(dtype)
    advantages = jnp.asarray(np.random.default_rng(5).normal(size=ROWS), dtype)
    update = jax.jit(grpo.make_update(grpo.Config(reduce=reduce, **config), tabular.score, TX))
    hyper = grpo.Hyper(
        entropy_coef=0.01,
        kl_coef=0.1,
        off_policy_threshold=jnp.asarray(0.15, dtype),
        surrogate_params={"delta": 1.3},
    )
    batch = grpo.Batch(sequences, old_logp, ref_logp, advantages)
    held = sequences.mask & (jnp.arange(ROWS) % 3 == 1)[:, None]
    return update, hyper, dataclasses.replace(batch, sampler_logp=old_logp, old_kl_mask=held)


CASES = {
    "sft": sft_case,
    "reward": reward_case,
    "ranking": ranking_case,
    "plackett_luce": plackett_luce_case,
    "preference": preference_case,
    "kto": unpaired_case,
    "bco": bco_case,
    "distillation": distillation_case,
    "distillation_top_k": top_k_distillation_case,
    "ppo": ppo_case,
    "ppo_ptx": ptx_case,
    "group": group_case,
}
# Of the costly laws the default tier runs those of one update of each kind.
every_kind = pytest.mark.parametrize("name", few(CASES, "preference", "ppo_ptx", "group"))


def initial_state(hyper, dtype=jnp.float32):
    module = grpo if isinstance(hyper, grpo.Hyper) else sys.modules[type(hyper).__module__]
    extra = [hyper] if module is ppo else []
    return module.init(tabular.init(0, dtype), TX, jax.random.key(0), *extra)


def as_arrays(hyper):
    return jax.tree.map(jnp.float32, hyper)


def assert_same(found, expected, **tolerance):
    def compare(a, b):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, **tolerance)

    jax.tree.map(compare, found, expected)


@every_kind
@pytest.mark.parametrize("parts", few([2, 8], 2))
def test_micro_batches_change_nothing(name, parts):
    """Lengths differ between the parts, which hold other numbers of tokens; moments follow the gradients."""
    with jax.enable_x64(True):
        results = []
        for micro_batches in (1, parts):
            update, hyper, batch = CASES[name](jnp.float64, micro_batches=micro_batches)
            state, metrics = jax.jit(update)(initial_state(hyper, jnp.float64), hyper, batch)
            assert int(state.learner.steps) == 1
            results.append((state.learner.opt_state, state.learner.params, metrics))
        moments = [leaf for leaf in jax.tree.leaves(results[0][0]) if leaf.dtype == jnp.float64]
        assert any(np.abs(leaf).max() > 1e-3 for leaf in moments)
        assert_same(results[1], results[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "reduce", few([token_mean, constant_length(9)], constant_length(9)), ids=["token", "constant"]
)
def test_micro_batches_change_nothing_under_other_reductions(reduce):
    with jax.enable_x64(True):
        results = []
        for micro_batches in (1, 4):
            update, hyper, batch = group_case(jnp.float64, reduce, micro_batches=micro_batches)
            state, metrics = jax.jit(update)(initial_state(hyper, jnp.float64), hyper, batch)
            results.append((state.learner.params, metrics))
        assert_same(results[1], results[0], rtol=0, atol=1e-12)


def map_sequences(change, batch):
    """Changes each `Sequences` in a batch."""
    is_one = lambda x: isinstance(x, Sequences)  # noqa: E731
    return jax.tree.map(lambda x: change(x) if is_one(x) else x, batch, is_leaf=is_one)


@every_kind
def test_a_batch_that_gives_nan_is_skipped_and_forgotten(name):
    update, hyper, batch = CASES[name](jnp.float32)
    update = jax.jit(update)
    state, _ = update(initial_state(hyper), hyper, batch)
    spoilt = map_sequences(lambda s: dataclasses.replace(s, positions=s.positions.at[2].set(-1)), batch)
    after, metrics = update(state, hyper, spoilt)
    assert int(metrics["skipped"]) == int(metrics["consecutive_skipped"]) == 1
    assert_same(after.learner.params, state.learner.params, rtol=0)
    assert_same(after.learner.opt_state, state.learner.opt_state, rtol=0)
    resumed, metrics = update(after, hyper, batch)
    unbroken, _ = update(state, hyper, batch)
    assert_same(resumed.learner.params, unbroken.learner.params, rtol=0)
    assert (int(metrics["skipped"]), int(metrics["consecutive_skipped"])) == (1, 0)
    assert int(resumed.learner.steps) == 2


@every_kind
def test_hyperparameters_do_not_recompile_and_all_have_an_effect(name):
    update, hyper, batch = CASES[name](jnp.float32)
    update, hyper = jax.jit(update), as_arrays(hyper)
    state, _ = update(initial_state(hyper), hyper, batch)
    expected, _ = update(state, hyper, batch)
    of_batch = {
        "reward_kl_coef",
        "advantage_kl_coef",
        "is_clip_low",
        "is_clip_high",
        "rejection_low",
        "rejection_high",
    }
    of_batch |= {"second_moment_threshold", "top_entropy_fraction", "reward_weights", "value_beta"}
    of_batch |= {"clip_cov_fraction", "clip_cov_low", "clip_cov_high", "kl_cov_fraction"}
    of_controllers = {"target_entropy", "entropy_coef_step", "kl_target", "kl_horizon"}
    of_rollout = {
        "gamma",
        "gae_lambda",
        "kl_target",
        "kl_horizon",
        "missing_eos_penalty",
        "positive_threshold",
    }
    for field in dataclasses.fields(hyper):
        if isinstance(hyper, ppo.Hyper) and getattr(hyper, field.name) is None:
            continue  # not asked for: see test_process_rewards
        if isinstance(hyper, ppo.Hyper) and field.name in of_rollout | {"kl_coef"}:
            continue  # these act in `language_batch`
        if field.name == "teacher_update_rate":
            continue  # moves a teacher that is an average of the policy: see test_distillation_updates
        if field.name == "ptx_coef" and name != "ppo_ptx":
            continue  # weighs the loss on text
        if isinstance(hyper, grpo.Hyper) and field.name in of_batch:
            continue  # these act in `make_batch`: see test_variants and test_grpo_corrections
        if isinstance(hyper, grpo.Hyper) and field.name in of_controllers:
            continue  # these move coefficients: see test_grpo_control
        if field.name == "sync":
            continue  # acts in the training step: see test_moving_reference
        if field.name == "penalty_coef":
            continue  # acts in the other policy loss: see test_ppo
        if field.name == "auxiliary":
            continue  # for models that tell of more than log-probs: see test_further_and_routing
        smaller = jax.tree.map(lambda number: 0.05 * number, getattr(hyper, field.name))
        smaller = smaller if field.name != "target_kl" else jnp.float32(1e-9)
        changed, _ = update(state, dataclasses.replace(hyper, **{field.name: smaller}), batch)
        same = jax.tree.map(jnp.array_equal, changed.learner.params, expected.learner.params)
        assert not jax.tree.all(same), field.name
    assert update._cache_size() == 1


@every_kind
def test_vmap_over_hyperparameters_equals_one_after_the_other(name):
    update, hyper, batch = CASES[name](jnp.float32)
    state = initial_state(hyper)
    several = jax.tree.map(lambda x: jnp.float32(x) * jnp.array([1.0, 0.3, 2.0]), hyper)
    together = jax.jit(jax.vmap(update, in_axes=(None, 0, None)))(state, several, batch)
    alone = jax.jit(update)
    for lane in range(3):
        of_lane = jax.tree.map(lambda x, lane=lane: x[lane], (several, together))
        assert_same(of_lane[1], alone(state, of_lane[0], batch), rtol=2e-5, atol=1e-6)


def padded(batch, rows, columns):
    """More columns on the right and more rows below, of NaN and out of the mask."""

    def pad(x):
        by_time = columns if x.ndim > 1 else 0
        widths = [(0, rows), (0, by_time)][: x.ndim]
        return jnp.pad(x, widths, constant_values=jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0)

    return jax.tree.map(pad, batch)


@pytest.mark.parametrize("name", few(["sft", "ppo", "ppo_ptx", "group"], "ppo_ptx", "group"))
def test_padding_changes_nothing(name):
    """Rows of no answer, too: what stands there, NaN included, is not looked at."""
    update, hyper, batch = CASES[name](jnp.float32)
    update = jax.jit(update)
    expected = update(initial_state(hyper), hyper, batch)
    found = update(initial_state(hyper), hyper, padded(batch, 4, 3))
    assert_same(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", few(["reward", "preference"], "preference"))
def test_longer_padding_of_pairs_changes_nothing(name):
    update, hyper, batch = CASES[name](jnp.float32)
    update = jax.jit(update)
    expected = update(initial_state(hyper), hyper, batch)
    found = update(initial_state(hyper), hyper, padded(batch, 0, 3))
    assert_same(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", few(["ranking", "plackett_luce"], "plackett_luce"))
def test_more_slots_than_answers_change_nothing(name):
    update, hyper, batch = CASES[name](jnp.float32)
    _, _, wide = CASES[name](jnp.float32, slots=5)
    assert wide.mask.shape[1] == 5
    update = jax.jit(update)
    expected, found = (update(initial_state(hyper), hyper, x) for x in (batch, wide))
    assert_same(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", few(["sft", "ppo", "group"], "sft", "group"))
def test_tokens_of_a_tool_inside_an_answer_do_not_teach(name):
    """Only rows of the table that some counted token follows move."""
    update, hyper, batch = CASES[name](jnp.float32)

    def with_tool(sequences):
        # After a 4 comes a token of the tool's, and nothing else comes after a 4.
        tokens = jnp.where(sequences.tokens == 4, 3, sequences.tokens).at[:, 2].set(4)
        return dataclasses.replace(sequences, tokens=tokens, mask=sequences.mask.at[:, 3].set(False))

    batch = map_sequences(with_tool, batch)
    if name == "ppo":
        batch = dataclasses.replace(batch, mask=batch.inputs.mask)
    state = initial_state(hyper)
    after, metrics = jax.jit(update)(state, hyper, batch)
    # The first moments, for the decay of weights moves every parameter.
    moments = np.abs(after.learner.opt_state[1].mu["logits"]).max(axis=1)
    assert moments[4] == 0
    assert (moments[:4] > 0).all()
    assert np.isfinite(float(metrics["gradient_norm"]))
