"""Options of losses on preference pairs: their numbers, their divergence, and losses made of losses."""

import dataclasses
import inspect
import re
from typing import Any, Literal

from rlhf_jax.algorithms import preference
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Finite, Positive, Share, Weight
from rlhf_jax.losses import preference_modifiers as modifiers
from rlhf_jax.losses.pair_logps import PairLossFn, check_loss_params, loss_parameters
from rlhf_jax.losses.preference_online import xpo_loss
from rlhf_jax.stages import defaults

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

_SCORES = {
    "forward_kl": modifiers.forward_kl_score,
    "js_divergence": modifiers.js_score,
    "alpha_divergence": modifiers.alpha_divergence_score,
}


def _owners() -> dict[str, list[str]]:
    """The losses and divergences that have a number, by its name."""
    owners: dict[str, list[str]] = {}
    for name, function in (preference.pair_losses() | {"xpo (online-dpo)": xpo_loss} | _SCORES).items():
        for number in loss_parameters(function):
            owners.setdefault(number, []).append(name)
    return owners


def _documented(owners: dict[str, list[str]]) -> str:
    lines = [
        f"  {number}: number of {', '.join(names)}; None for the published one, or the default of the loss."
        for number, names in owners.items()
    ]
    return "\n".join(["Numbers of losses beside beta.", "", "Attributes:", *lines, ""])


_RANGES: dict[str, Any] = {"label_smoothing": Share, "nll_weight": Weight, "tau": Positive, "gamma": Weight}


LossParams: Any = dataclasses.make_dataclass(
    "LossParams",
    [(number, _RANGES.get(number, Finite) | None, dataclasses.field(default=None)) for number in _owners()],
    frozen=True,
    kw_only=True,
    namespace={"__doc__": _documented(_owners()), "__module__": __name__},
)
"""The numbers of all losses as options: those that stand in their signatures."""


def mixed(loss: str | PairLossFn, loss_weights: tuple[float, ...]) -> tuple[PairLossFn, dict[str, float]]:
    """(the loss by this name, or the mix of several, its weights by the keywords of the mix).

    Raises:
      UserError: there are not as many weights as losses.
    """
    names = [name.strip() for name in loss.split(",")] if isinstance(loss, str) else [str(loss)]
    if len(names) == 1 and not loss_weights:
        return preference.find_pair_loss(loss), {}
    if len(names) != len(loss_weights) or len(set(names)) < len(names) or len(names) == 1:
        raise UserError(
            f"--loss {loss} and --loss-weights {' '.join(map(str, loss_weights)) or '(none)'} do not go "
            "together: give different losses with a comma between them, and a weight for each"
        )
    fns = {re.sub(r"\W", "_", name): preference.find_pair_loss(name) for name in names}
    return modifiers.mixed_loss(fns), dict(zip((f"{name}_weight" for name in fns), loss_weights, strict=True))


def with_modifiers(
    loss_fn: PairLossFn, *, divergence: Divergence = "reverse_kl", rpo_alpha: float | None = None
) -> tuple[PairLossFn, dict[str, float]]:
    """(the loss under a divergence, with a likelihood beside it, what `rpo_alpha` is in it)."""
    if divergence != "reverse_kl":
        loss_fn = modifiers.with_divergence(loss_fn, _SCORES[divergence])
    if rpo_alpha is None:
        return loss_fn, {}
    return modifiers.with_nll(loss_fn), {"rpo_alpha": rpo_alpha}


def given(params: Any) -> dict[str, float]:
    """The numbers that are not None."""
    return {name: value for name, value in vars(params).items() if value is not None}


def filled(params: Any, loss_fn: PairLossFn, method: str) -> Any:
    """`LossParams` in which those that the loss has are the given ones, the published ones, or its defaults.

    Args:
      method: a key of `defaults.PUBLISHED`, or a name that is not there.
    Raises:
      UserError: a number is given that the loss does not have.
    """
    own = loss_parameters(loss_fn)
    published = defaults.PUBLISHED[method].loss_params if method in defaults.PUBLISHED else {}
    found = given(params)
    check_loss_params(loss_fn, {**published, **found})
    numbers = {
        name: default
        for name, default in own.items()
        if hasattr(params, name) and default not in (None, inspect.Parameter.empty)
    }
    return dataclasses.replace(params, **{**numbers, **published, **found})
