"""The numbers of pair losses as options: all of them, filled in, and refused where a loss has none."""

import dataclasses
import inspect

import pytest

from rlhf_jax import losses
from rlhf_jax.algorithms import preference
from rlhf_jax.core.errors import UserError
from rlhf_jax.stages import dpo, loss_options
from rlhf_jax.stages.entry import NOTHING, Given, options_of


def resolved(settings, loss=None):
    """(options, loss, numbers) of a run with these settings, and perhaps a loss from Python."""
    options = options_of(dpo.Options, "runs/x", {"model": "m", "data": "d", "beta": 0.1, **settings})
    return dpo.resolve_loss(options, NOTHING if loss is None else Given(loss=loss))


def test_every_number_of_every_loss_is_an_option():
    fields = {field.name for field in dataclasses.fields(loss_options.LossParams)}
    for loss_fn in (*preference.pair_losses().values(), losses.xpo_loss):
        keywords = {
            p.name for p in inspect.signature(loss_fn).parameters.values() if p.kind == p.KEYWORD_ONLY
        }
        assert keywords - {"beta", "mask", "weights", "denominator"} <= fields
    assert fields == {"label_smoothing", "gamma", "alpha", "tau", "nll_weight"}


def test_numbers_are_the_given_the_published_or_those_of_the_loss():
    options, _, numbers = resolved({"loss": "simpo", "gamma": 1.6})
    assert numbers == {"gamma": 1.6, "label_smoothing": 0.0, "nll_weight": 0.0}
    assert options.loss_params.gamma == 1.6
    assert resolved({"loss": "alpha_po"})[2] == {"gamma": 0.1, "alpha": 0.25}
    # The smoothing of DPO is that of the soft labels, where there are any: no number takes their place.
    assert resolved({"loss": "dpo"})[2] == {}
    assert resolved({"loss": "kto"})[1:] == (None, {})


def test_modifiers_bring_their_numbers():
    _, loss_fn, numbers = resolved(
        {"loss": "dpo, exo", "loss_weights": (0.8, 0.2), "rpo_alpha": 0.5, "label_smoothing": 0.01}
    )
    assert numbers == {"label_smoothing": 0.01, "dpo_weight": 0.8, "exo_weight": 0.2, "rpo_alpha": 0.5}
    assert numbers.keys() <= inspect.signature(loss_fn).parameters.keys()
    _, _, numbers = resolved({"loss": "dpo", "f_divergence_type": "alpha_divergence", "alpha": 0.3})
    assert numbers == {"alpha": 0.3}


def test_losses_from_python_take_numbers_by_their_own_keywords():
    def margin_loss(pairs, *, beta, mask, denominator, gamma=0.5):
        return losses.simpo_loss(pairs, beta=beta, mask=mask, denominator=denominator, gamma=gamma)

    assert resolved({}, margin_loss)[2] == {"gamma": 0.5}
    assert resolved({"gamma": 2.0}, margin_loss)[2] == {"gamma": 2.0}
    with pytest.raises(UserError, match="margin_loss has no parameter tau: it has gamma"):
        resolved({"tau": 2.0}, margin_loss)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss": "dpo", "gamma": 1.0}, "dpo_loss has no parameter gamma: it has label_smoothing"),
        ({"loss": "nca", "tau": 1.0}, "nca_loss has no parameter tau: it has none but beta"),
        ({"loss": "dpo", "f_divergence_type": "alpha_divergence"}, "needs alpha"),
        ({"loss": "simpo", "f_divergence_type": "js_divergence"}, "no f-divergence"),
        ({"loss": "dpo,ipo", "loss_weights": (1.0,)}, "a weight for each"),
        ({"loss": "dpo", "loss_weights": (1.0,)}, "a weight for each"),
        ({"loss": "dpo,dpo", "loss_weights": (1.0, 1.0)}, "different losses"),
        ({"loss": "dpo,kto", "loss_weights": (1.0, 1.0)}, "loss 'kto' is neither"),
    ],
)
def test_numbers_and_modifiers_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        resolved(settings)
