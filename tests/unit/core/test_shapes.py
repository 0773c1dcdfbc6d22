"""Shape checks: what fits passes unchanged, and every wrong argument gets one sentence that names it."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from rlhf_jax import kernels, losses
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.kernels.prepare import cleaned, cleaned_constant

STEPS, ROWS = jnp.ones((4, 6)), jnp.ones(4)
MASK = jnp.ones((4, 6), bool)


@pytest.fixture(autouse=True)
def _as_users_meet_it():
    """With annotations checked, as in other tests, a wrong argument never gets to the check of this file."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_what_fits_comes_back_as_arrays():
    first, second, nothing, row = check_shapes(
        "f", a=(STEPS, "B T"), b=([[1.0] * 6] * 4, "B T"), c=(None, "B T"), d=(np.ones(4), "B T|B")
    )
    assert first is STEPS
    np.testing.assert_array_equal(second, STEPS)
    assert nothing is None
    assert row.shape == (4,)


def test_a_star_stands_for_any_number_of_axes():
    for lead in ((), (3,), (2, 3)):
        check_shapes("f", logits=(jnp.ones((*lead, 5)), "*S V"), ids=(jnp.ones(lead), "*S"))
    with pytest.raises(UserError, match=r"ids has shape \(2,\), expected \[\*S\] with \*S = 3 as in logits"):
        check_shapes("f", logits=(jnp.ones((3, 5)), "*S V"), ids=(jnp.ones(2), "*S"))
    with pytest.raises(UserError, match=r"logits has shape \(\), expected \[\*S, V\]"):
        check_shapes("f", logits=(1.0, "*S V"))


def test_sizes_must_agree_within_a_call():
    with pytest.raises(
        UserError, match=r"b has shape \(4, 5\), expected \[B, T\] with B = 4, T = 6 as in a$"
    ):
        check_shapes("f", a=(STEPS, "B T"), b=(STEPS[:, :5], "B T"))


def test_what_is_no_array_is_named_by_its_type():
    for wrong in ({"a": 1}, "text", [[1.0], [1.0, 2.0]], object()):
        with pytest.raises(UserError, match=f"f: a has type {type(wrong).__name__}, expected an array"):
            check_shapes("f", a=(wrong, "B T"))


def test_a_scalar_discount_is_told_what_to_give():
    message = r"discounts has shape \(\), expected \[B, T\] with B = 4, T = 6 as in rewards: give one"
    with pytest.raises(UserError, match=message):
        kernels.generalized_advantage_estimation(STEPS, STEPS, 0.99, ROWS, MASK)  # pyright: ignore
    with pytest.raises(UserError, match="vtrace: discounts has shape"):
        kernels.vtrace(STEPS, STEPS, STEPS, 0.99, ROWS, MASK)  # pyright: ignore


def test_wrong_ranks_name_function_and_parameter():
    with pytest.raises(UserError, match=r"_advantages: rewards has shape \(4,\), expected \[N, G\]: give"):
        kernels.group_relative_advantages(ROWS)
    with pytest.raises(UserError, match=r"grpo_loss: advantages has shape \(6,\), expected \[B, T\] or"):
        losses.grpo_loss(STEPS, STEPS, None, jnp.ones(6), MASK)
    with pytest.raises(UserError, match=r"discounted_returns: bootstrap_value has shape \(4, 1\)"):
        kernels.discounted_returns(STEPS, STEPS, jnp.ones((4, 1)), MASK)
    with pytest.raises(UserError, match=r"squared_value_loss: returns has shape \(4,\), expected \[B, T\]"):
        losses.squared_value_loss(STEPS, ROWS, MASK)


def pairs_of(**columns):
    """`PairLogps` of anything, as it is without checked annotations; the other columns are rows of ones."""
    pairs = object.__new__(losses.PairLogps)
    defaults = dict.fromkeys(("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"), ROWS)
    defaults |= dict.fromkeys(("chosen_length", "rejected_length", "chosen_from_ref", "preference"))
    for name, values in (defaults | columns).items():
        object.__setattr__(pairs, name, values)
    return pairs


def test_pair_losses_take_one_argument_of_rows():
    with pytest.raises(UserError, match=r"dpo_loss: pairs has type list, expected one PairLogps"):
        losses.dpo_loss([-1.0, -2.0])  # pyright: ignore
    columns = {
        "policy_chosen": [-1.0, -2.0],
        "policy_rejected": [-2.0, -3.0],
        "ref_chosen": [-1.5, -2.0],
        "ref_rejected": [-2.0, -2.5],
    }
    as_arrays = losses.PairLogps(**{name: jnp.asarray(values) for name, values in columns.items()})
    from_lists, _ = losses.dpo_loss(pairs_of(**columns))
    np.testing.assert_array_equal(from_lists, losses.dpo_loss(as_arrays)[0])
    with pytest.raises(UserError, match=r"dpo_loss: pairs.policy_chosen has shape \(4, 6\), expected \[B\]"):
        losses.dpo_loss(pairs_of(policy_chosen=STEPS))
    with pytest.raises(UserError, match=r"ipo_loss: pairs.chosen_length .* needed"):
        losses.ipo_loss(losses.PairLogps(ROWS, ROWS, ROWS, ROWS))
    with pytest.raises(UserError, match=r"hinge_loss: pairs.ref_chosen is None"):
        losses.hinge_loss(losses.PairLogps(ROWS, ROWS))
    with pytest.raises(UserError, match=r"xpo_loss: pairs.chosen_from_ref is None"):
        losses.xpo_loss(losses.PairLogps(ROWS, ROWS, ROWS, ROWS))


def test_checks_happen_at_trace_time_and_once():
    traces = []

    @jax.jit
    def loss(rewards):
        traces.append(None)
        return kernels.whiten(rewards, MASK)

    plain = jax.make_jaxpr(lambda x: cleaned_constant(x, MASK))(STEPS)
    checked = jax.make_jaxpr(
        lambda x: cleaned_constant(*check_shapes("f", a=(x, "B T"), mask=(MASK, "B T")))
    )(STEPS)
    assert str(plain) == str(checked)
    np.testing.assert_array_equal(loss(STEPS), loss(STEPS + 1))
    assert len(traces) == 1


def test_preparation_aligns_masks_with_values_of_other_ranks():
    mask = MASK.at[0, 2].set(False)
    logits = jnp.full((4, 6, 3), jnp.nan).at[1:].set(1.0).at[0, :2].set(1.0).at[0, 3:].set(1.0)
    assert float(jnp.sum(cleaned(logits, mask))) == (24 - 1) * 3
    rows = cleaned(jnp.asarray([1, 2, 3, 4], jnp.bfloat16), mask)
    assert rows.dtype == jnp.float32
    np.testing.assert_array_equal(rows, jnp.asarray([1, 2, 3, 4.0])[:, None] * mask)
    gradient = jax.grad(lambda x: jnp.sum(cleaned(x, mask) * cleaned_constant(x, mask)))(2 * STEPS)
    np.testing.assert_array_equal(gradient, 2.0 * mask)
