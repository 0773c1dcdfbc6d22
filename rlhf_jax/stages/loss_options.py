"""Options of losses on preference pairs: numbers, divergence, losses made of losses; and losses of users."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms import preference
from rlhf_jax.core.arguments import told
from rlhf_jax.core.errors import UserError, error_place, error_summary
from rlhf_jax.core.ranges import Finite, Positive, Share, Weight
from rlhf_jax.losses import preference_modifiers as modifiers
from rlhf_jax.losses.pair_logps import PairLogps, PairLossFn, check_loss_params, loss_parameters
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


# Losses of users ------------------------------------------------------------------------------------


def check_pair_loss(loss_fn: Callable[..., Any], numbers: Mapping[str, float]) -> None:
    """Raises: UserError where a function is no loss on pairs, before anything is compiled.

    Args:
      numbers: of the loss, beside beta.
    """
    rows, lengths, number = jnp.zeros(2), jnp.ones(2, int), jnp.float32(1)
    pairs, mask = PairLogps(rows, rows, rows, rows, lengths, lengths), jnp.ones(2, bool)
    keywords = {"beta": number, "mask": mask, "denominator": number, **dict.fromkeys(numbers, number)}
    _check_loss(loss_fn, "(pairs, *, beta, mask, denominator)", (pairs,), keywords)


def check_ranking_loss(loss_fn: Callable[..., Any]) -> None:
    """Raises: UserError where a function is no loss on rankings, before anything is compiled."""
    arguments = jnp.zeros((2, 2)), jnp.zeros((2, 2), int), jnp.ones((2, 2), bool)
    keywords: dict[str, Any] = dict.fromkeys(("margin", "centring", "denominator"), jnp.float32(1))
    _check_loss(loss_fn, "(rewards, ranks, mask, *, margin, centring, denominator)", arguments, keywords)


def _check_loss(
    loss_fn: Callable[..., Any], signature: str, arguments: tuple[Any, ...], keywords: Mapping[str, Any]
) -> None:
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    meant = f"give a function {signature} -> (loss, metrics)"
    try:
        inspect.signature(loss_fn).bind(*arguments, **keywords)
    except TypeError as error:
        raise UserError(f"the loss {name} cannot be called ({error}): {meant}") from None
    try:
        returned = jax.eval_shape(loss_fn, *arguments, **keywords)
    except UserError:
        raise
    except Exception as error:  # of the user's own code
        where = f"{error_summary(error)}{error_place(error)}"
        raise UserError(f"the loss {name} raised {where} on two rows: mend the function") from error
    if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[1], Mapping):
        parts = returned if isinstance(returned, tuple) else (returned,)
        what = " and ".join(f"an array {p.shape}" if hasattr(p, "shape") else told(p) for p in parts)
        raise UserError(f"the loss {name} returned {what}: {meant}, metrics a dict of numbers")
    loss, metrics = returned
    for part, value in {"loss": loss, **{f"metric {key}": value for key, value in metrics.items()}}.items():
        shape = getattr(value, "shape", None)
        if shape != () or (part == "loss" and not jnp.issubdtype(value.dtype, jnp.floating)):
            what = told(value) if shape is None else f"of shape {shape} and {value.dtype}"
            raise UserError(f"the loss {name}: its {part} is {what}: reduce it to one number")
