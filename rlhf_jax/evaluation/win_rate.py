"""Win rates of one system's answers over another's. NumPy only.

A preference is the probability that the first answer is better: 1 a win, 0 a loss, 1/2 a tie. The win rate
is the mean of preferences; `statistics.bootstrap_interval` gives its interval.
"""

import numpy as np
from numpy.typing import ArrayLike

_STEPS, _TOLERANCE = 100, 1e-12


def both_orders(forth: ArrayLike, back: ArrayLike) -> np.ndarray:
    """Preferences averaged over both orders: position bias cancels.

        (forth + 1 - back) / 2

    Args:
      forth: preference for the first answer, which the judge reads first.
      back: preference that the judge gives the other answer when it reads that one first.
    """
    first, second = np.asarray(forth, np.float64), np.asarray(back, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"expected as many preferences in both orders, not {first.shape}, {second.shape}")
    return (first + 1 - second) / 2


def order_bias(forth: ArrayLike, back: ArrayLike) -> float:
    """Mean |forth + back - 1|: 0 where the order is nothing to the judge, 1 where it is everything."""
    return float(np.mean(np.abs(np.asarray(forth, np.float64) + np.asarray(back, np.float64) - 1)))


def win_rate(preferences: ArrayLike) -> float:
    """Mean preference, ties counting half."""
    return float(np.mean(_preferences(preferences)))


def length_controlled_win_rate(preferences: ArrayLike, longer_by: ArrayLike) -> float:
    """Win rate at equal length (after Dubois et al. 2024): a logistic fit, its length term set to 0.

        P(first preferred) = sigmoid(theta + phi tanh(longer_by / std longer_by)),    returns sigmoid(theta)

    The published form has a term for how hard each instruction is, fitted over many models; with two systems
    there is none. Preferences that the lengths separate have no finite fit: Newton's steps are then cut.

    Args:
      preferences: [N], in [0, 1].
      longer_by: [N], length of the first answer minus that of the second, in any unit.
    """
    wins = _preferences(preferences)
    difference = np.asarray(longer_by, np.float64)
    if difference.shape != wins.shape:
        raise ValueError(f"expected a length for each of {len(wins)} preferences, not {difference.shape}")
    spread = float(np.std(difference))
    if spread == 0:  # lengths that do not differ from each other explain nothing
        return win_rate(wins)
    inputs = np.stack([np.ones(len(wins)), np.tanh(difference / spread)], axis=1)
    weights = np.zeros(2)
    for _ in range(_STEPS):
        chances = 1 / (1 + np.exp(-inputs @ weights))
        curvature = (inputs * (chances * (1 - chances))[:, None]).T @ inputs
        step = np.linalg.lstsq(curvature, inputs.T @ (wins - chances), rcond=None)[0]
        weights += np.clip(step, -1, 1)
        if np.max(np.abs(step)) < _TOLERANCE:
            break
    return float(1 / (1 + np.exp(-weights[0])))


def _preferences(preferences: ArrayLike) -> np.ndarray:
    values = np.asarray(preferences, np.float64)
    if values.ndim != 1 or not values.size or not ((values >= 0) & (values <= 1)).all():
        raise ValueError("expected at least one preference, each from 0 to 1, in one dimension")
    return values
