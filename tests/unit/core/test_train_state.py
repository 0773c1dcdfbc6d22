"""The guarded optimizer step, its schedule, and gradients of a batch in parts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.minibatches import scan_minibatches
from rlhf_jax.core.train_state import (
    OptimizerConfig,
    accumulate_gradients,
    apply_gradients,
    init_train_state,
    make_optimizer,
    with_frozen,
    with_total_steps,
    without_frozen,
)
from rlhf_jax.core.trees import merge, named_leaves, partition

PARAMS = {"bias": np.array([0.5, -1.0]), "kernel": np.array([[1.0, -2.0], [0.25, 3.0]])}


def draw_gradients(steps):
    rng = np.random.default_rng(0)
    return [{n: rng.normal(size=p.shape) * 3 for n, p in PARAMS.items()} for _ in range(steps)]


def shares(config, steps):
    """How far a weight moves under a gradient of 1 and a learning rate of 1, step by step."""
    tx = make_optimizer(config)
    learner, seen = init_train_state({"w": jnp.zeros(())}, tx), []
    step = jax.jit(
        lambda s: apply_gradients(s, {"w": jnp.ones(())}, tx, learning_rate=1.0, loss=jnp.zeros(()))
    )
    for _ in range(steps):
        before = learner.params["w"]
        learner, _ = step(learner)
        seen.append(float(before - learner.params["w"]))
    return seen


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1, 1]),
        ({"warmup_steps": 4}, [0, 0.25, 0.5, 0.75, 1, 1]),
        ({"schedule": "linear", "total_steps": 4, "end_lr_ratio": 0.2}, [1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        (
            {"schedule": "linear", "warmup_steps": 2, "total_steps": 6},
            [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0],
        ),
        (
            {"schedule": "cosine", "warmup_steps": 1, "total_steps": 5, "end_lr_ratio": 0.1},
            [0, *(0.1 + 0.9 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(5)), 0.1],
        ),
        (
            {
                "schedule": "wsd",
                "warmup_steps": 2,
                "total_steps": 10,
                "decay_fraction": 0.4,
                "end_lr_ratio": 0.5,
            },
            [0, 0.5, 1, 1, 1, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.5],
        ),
    ],
)
def test_schedules_give_the_stated_share_at_each_step(options, expected):
    # Without decay of the moments Adam's own step is 1 for a gradient that never changes.
    np.testing.assert_allclose(
        shares(OptimizerConfig(epsilon=0.0, clip_norm=math.inf, **options), len(expected)),
        expected,
        atol=1e-6,
    )


def test_a_decay_without_an_end_is_refused():
    for schedule in ("cosine", "linear", "wsd"):
        with pytest.raises(UserError, match="total_steps"):
            make_optimizer(OptimizerConfig(schedule=schedule))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("total_steps", [1, 2, 5])
def test_a_run_shorter_than_its_warm_up_rises_until_its_last_step(schedule, total_steps):
    config = with_total_steps(OptimizerConfig(schedule=schedule, warmup_steps=20, epsilon=0.0), total_steps)
    expected = [step / max(total_steps - 1, 1) for step in range(total_steps)] if total_steps > 1 else [1]
    np.testing.assert_allclose(shares(config, total_steps), expected, atol=1e-6)


def test_warm_up_is_a_share_of_the_run_and_its_length_is_not_overruled():
    config = OptimizerConfig(schedule="linear")
    assert [with_total_steps(config, steps).warmup for steps in (1, 10, 100, 1000)] == [0, 0, 3, 30]
    assert with_total_steps(config, 100).decay_start == 3
    given = OptimizerConfig(schedule="linear", total_steps=200, warmup_ratio=0.1)
    assert with_total_steps(given, 100) == given
    assert given.warmup == 20
    assert OptimizerConfig().warmup == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"b1": 1.0},
        {"b2": -0.5},
        {"epsilon": -1.0},
        {"clip_norm": 0.0},
        {"weight_decay": math.inf},
        {"weight_decay": math.nan},
        {"end_lr_ratio": 5.0},
        {"decay_fraction": 0.0},
        {"warmup_ratio": 1.5},
        {"warmup_steps": -5},
        {"total_steps": -1},
    ],
)
def test_numbers_that_no_optimizer_can_have_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        make_optimizer(OptimizerConfig(**wrong))


def test_steps_equal_adamw_written_out():
    config = OptimizerConfig(warmup_steps=3, clip_norm=7.0, weight_decay=0.1, b1=0.8, b2=0.9, epsilon=1e-3)
    learning_rate, gradients = 0.05, draw_gradients(6)
    params = {n: p.copy() for n, p in PARAMS.items()}
    first, second = ({n: np.zeros_like(p) for n, p in params.items()} for _ in range(2))
    norms = []
    for t, gradient in enumerate(gradients):
        norms.append(math.sqrt(sum((g**2).sum() for g in gradient.values())))
        for n, g in gradient.items():
            g = g * min(1, 7.0 / norms[-1])
            first[n] = 0.8 * first[n] + 0.2 * g
            second[n] = 0.9 * second[n] + 0.1 * g**2
            step = (first[n] / (1 - 0.8 ** (t + 1))) / (np.sqrt(second[n] / (1 - 0.9 ** (t + 1))) + 1e-3)
            decay = 0.1 * params[n] if n == "kernel" else 0
            params[n] = params[n] - learning_rate * min(1, t / 3) * (step + decay)
    assert min(norms) < 7.0 < max(norms)  # some are clipped, others not
    with jax.enable_x64(True):
        tx = make_optimizer(config)
        learner = init_train_state(jax.tree.map(jnp.asarray, PARAMS), tx)
        for gradient, norm in zip(gradients, norms, strict=True):
            learner, metrics = apply_gradients(
                learner,
                jax.tree.map(jnp.asarray, gradient),
                tx,
                learning_rate=learning_rate,
                loss=jnp.zeros(()),
            )
            np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-12)
    for n, p in params.items():
        # Optax computes schedules and powers of the decays in float32.
        np.testing.assert_allclose(learner.params[n], p, rtol=1e-7, err_msg=n)
    assert int(learner.steps) == 6


def test_stacked_scales_and_biases_do_not_decay():
    """Layers under a scan have a leading axis, which makes no matrix of a vector."""
    params = {"layer": {n: jnp.ones((3, 2)) for n in ("scale", "bias", "kernel")}, "kernel": jnp.ones(2)}
    tx = make_optimizer(OptimizerConfig(weight_decay=0.5))
    zeros = jax.tree.map(jnp.zeros_like, params)
    learner, _ = apply_gradients(
        init_train_state(params, tx), zeros, tx, learning_rate=1.0, loss=jnp.zeros(())
    )
    for name, expected in (("scale", 1.0), ("bias", 1.0), ("kernel", 0.5)):
        np.testing.assert_array_equal(learner.params["layer"][name], expected, err_msg=name)
    np.testing.assert_array_equal(learner.params["kernel"], 1.0)


@pytest.mark.parametrize("spoilt", ["gradient", "infinity", "loss", "norm"])
def test_a_step_that_is_not_finite_leaves_no_trace(spoilt):
    tx = make_optimizer(OptimizerConfig(warmup_steps=4, clip_norm=1.0, weight_decay=0.1))
    good = [jax.tree.map(jnp.float32, g) for g in draw_gradients(4)]
    bad, loss = dict(good[0]), jnp.zeros(())
    if spoilt == "loss":
        loss = jnp.float32(jnp.nan)
    else:
        value = {"gradient": jnp.nan, "infinity": jnp.inf, "norm": 1e30}[spoilt]
        bad["kernel"] = bad["kernel"].at[0, 1].set(value)

    @jax.jit
    def step(learner, gradients, loss):
        return apply_gradients(learner, gradients, tx, learning_rate=0.1, loss=loss)

    zero = jnp.zeros(())
    plan = [(good[0], zero), (bad, loss), (bad, loss), (good[1], zero), (bad, loss), (good[2], zero)]
    learner = init_train_state(jax.tree.map(jnp.float32, PARAMS), tx)
    unbroken, counts = learner, []
    for gradients, of_step in plan:
        learner, metrics = step(learner, gradients, of_step)
        counts.append((int(learner.steps), int(metrics["skipped"]), int(metrics["consecutive_skipped"])))
    for gradients in good[:3]:
        unbroken, _ = step(unbroken, gradients, zero)
    assert counts == [(1, 0, 0), (1, 1, 1), (1, 2, 2), (2, 2, 0), (2, 3, 1), (3, 3, 0)]
    for name in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(learner, name), getattr(unbroken, name))


@pytest.mark.parametrize(
    ("options", "learning_rate"),
    [({}, jnp.inf), ({}, jnp.nan), ({}, 3e38), ({"epsilon": 0.0}, 0.1), ({"optimizer": "sgd"}, 3e38)],
)
def test_an_update_that_is_not_finite_spoils_nothing(options, learning_rate):
    """Gradients are whole: it is the learning rate, or 0 divided by an epsilon of 0."""
    tx = make_optimizer(OptimizerConfig(warmup_ratio=0, clip_norm=1e9, **options))
    params = {"a": jnp.float32([1.0, 3e38]), "b": jnp.zeros(2)}
    learner = init_train_state(params, tx)
    gradients = {"a": jnp.float32([1.0, -3.0]), "b": jnp.zeros(2)}
    for count in (1, 2, 3):
        learner, metrics = apply_gradients(
            learner, gradients, tx, learning_rate=jnp.float32(learning_rate), loss=jnp.zeros(())
        )
        assert int(metrics["consecutive_skipped"]) == count
    for leaf in jax.tree.leaves(learner):
        assert np.isfinite(leaf).all()


def learner_of(params, frozen=None):
    return init_train_state(params, optax.identity(), frozen)


def mean_square(params, rows):
    """Divided by the 12 rows of the whole batch."""
    error = rows["x"] @ params["w"] - rows["y"]
    loss = jnp.sum(error**2) / 12
    return loss, {"loss": loss, "rows": jnp.int32(rows["y"].shape[0])}


def regression(dtype):
    rng = np.random.default_rng(1)
    rows = {"x": jnp.asarray(rng.normal(size=(12, 3)), dtype), "y": jnp.asarray(rng.normal(size=12), dtype)}
    return {"w": jnp.asarray(rng.normal(size=3), dtype)}, rows


@pytest.mark.parametrize("micro_batches", [2, 3, 12])
def test_parts_sum_to_the_whole(micro_batches):
    with jax.enable_x64(True):
        params, rows = regression(jnp.float64)
        learner = learner_of(params)
        whole = accumulate_gradients(mean_square, learner, rows)
        parts = accumulate_gradients(mean_square, learner, rows, micro_batches=micro_batches)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), parts, whole)
        assert parts[2]["rows"].dtype == whole[2]["rows"].dtype


def test_parts_of_low_precision_are_summed_in_float32():
    """1 + 255 x 1/256: a sum in bfloat16 would stop at 1."""
    rows = jnp.concatenate([jnp.ones(1, jnp.bfloat16), jnp.full(255, 1 / 256, jnp.bfloat16)])
    gradients, loss, _ = accumulate_gradients(
        lambda w, r: (jnp.sum(w * r), {}), learner_of(jnp.ones((), jnp.bfloat16)), rows, micro_batches=256
    )
    assert gradients.dtype == loss.dtype == jnp.bfloat16
    assert float(gradients) == float(loss) == 2.0


def test_rows_that_do_not_split_are_refused():
    params, rows = regression(jnp.float32)
    learner = learner_of(params)
    with pytest.raises(UserError, match="micro_batches=5 does not divide the 12 rows"):
        accumulate_gradients(mean_square, learner, rows, micro_batches=5)


# A part of the model is frozen ----------------------------------------------------------------------


def two_layers(width=64):
    keys = jax.random.split(jax.random.key(0), 3)
    base = {f"layer_{i}": {"kernel": jax.random.normal(keys[i], (width, width)) / 8} for i in range(2)}
    return merge(base, {"layer_1": {"scale": jnp.ones(width)}})


def of_model(params, rows):
    hidden = jnp.tanh(rows @ params["layer_0"]["kernel"])
    return jnp.sum((hidden @ params["layer_1"]["kernel"] * params["layer_1"]["scale"]) ** 2), {}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradients_of_what_is_trained_are_those_of_the_whole(micro_batches):
    params, rows = two_layers(), jnp.ones((4, 64))
    whole, loss, _ = accumulate_gradients(of_model, learner_of(params), rows, micro_batches=micro_batches)
    trained, frozen = partition(params, lambda name, leaf: name.endswith("scale"))
    learner = learner_of(trained, frozen)
    gradients, same_loss, _ = accumulate_gradients(of_model, learner, rows, micro_batches=micro_batches)
    assert named_leaves(gradients).keys() == {"layer_1/scale"}
    np.testing.assert_allclose(gradients["layer_1"]["scale"], whole["layer_1"]["scale"], rtol=1e-6)
    np.testing.assert_allclose(same_loss, loss, rtol=1e-6)


def test_what_is_frozen_is_neither_moved_nor_copied_nor_saved():
    """Through epochs of mini-batches under donation: the same buffers come out, and no second set is made."""
    trained, frozen = partition(two_layers(), lambda name, leaf: name.endswith("scale"))
    expected = jax.tree.map(np.array, frozen)  # a copy: what NumPy looks at cannot be donated
    tx = make_optimizer(OptimizerConfig(weight_decay=0.1))
    learner = init_train_state(trained, tx, frozen)
    assert named_leaves(learner.opt_state).keys() & {"1/mu/layer_1/scale"}
    assert not [name for name in named_leaves(learner.opt_state) if "kernel" in name]

    def step(learner, rows):
        gradients, loss, metrics = accumulate_gradients(of_model, learner, rows, micro_batches=2)
        learner, guard = apply_gradients(learner, gradients, tx, learning_rate=0.1, loss=loss)
        return learner, metrics | guard, guard["gradient_norm"] > 1e9

    @functools.partial(jax.jit, donate_argnums=0)
    def update(learner, rows):
        return scan_minibatches(step, learner, rows, jax.random.key(0), epochs=2, minibatches=2)[0]

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    memory = update.lower(learner, jnp.ones((8, 64))).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size
    before = {name: leaf.unsafe_buffer_pointer() for name, leaf in named_leaves(frozen).items()}
    learner = update(learner, jnp.ones((8, 64)))
    after = {name: leaf.unsafe_buffer_pointer() for name, leaf in named_leaves(learner.frozen).items()}
    assert before == after
    jax.tree.map(np.testing.assert_array_equal, learner.frozen, expected)
    assert not np.array_equal(learner.params["layer_1"]["scale"], np.ones(64))

    state = {"learner": learner, "key": jax.random.key(0)}
    saved = without_frozen(state)
    assert not [name for name in named_leaves(saved) if "kernel" in name]
    assert jax.tree.structure(with_frozen(saved, state)) == jax.tree.structure(state)
