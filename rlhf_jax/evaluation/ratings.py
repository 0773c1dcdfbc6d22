"""Ratings of players from the games between them. NumPy only."""

import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike

ELO = 400 / math.log(10)
"""Elo points of one nat of log-odds: 400 points are odds of ten to one."""

_STEPS, _TOLERANCE = 200, 1e-10


@dataclasses.dataclass(frozen=True)
class Ratings:
    """Elo ratings, 0 for the anchor.

    Attributes:
      elo: of each player.
      error: standard error of its difference from the anchor, by the Fisher information.
    """

    elo: np.ndarray
    error: np.ndarray


def bradley_terry_ratings(scores: ArrayLike, *, anchor: int = 0, prior: float = 0.5) -> Ratings:
    """Elo ratings by the maximum likelihood of the Bradley-Terry model (Bradley & Terry 1952; Hunter 2004).

        P(i beats j) = 1 / (1 + 10^((R_j - R_i) / 400)),    a draw is half a win for either

    Args:
      scores: [players, players]; what i made against j, in points: wins and half the draws.
      anchor: whose rating is 0.
      prior: drawn games that each pair which met is given beside its own: without any, who won every game
        has no finite rating.

    Raises:
      ValueError: ratings are infinite (`prior` is 0), or players have met no others.
    """
    points = np.asarray(scores, np.float64)
    if points.ndim != 2 or points.shape[0] != points.shape[1] or (points < 0).any() or np.diag(points).any():
        raise ValueError("expected points [players, players], not negative, and none against oneself")
    met = (points + points.T) > 0
    points = points + prior / 2 * met
    games = points + points.T
    free = np.arange(len(points)) != anchor
    strengths = np.zeros(len(points))
    for _ in range(_STEPS):
        wins = 1 / (1 + np.exp(strengths[None] - strengths[:, None]))
        gradient = np.sum(points - games * wins, axis=1)
        weight = games * wins * wins.T
        information = np.diag(weight.sum(axis=1)) - weight
        try:
            step = np.linalg.solve(information[np.ix_(free, free)], gradient[free])
        except np.linalg.LinAlgError:
            break
        # Newton's steps are cut, as they may overshoot from afar.
        strengths[free] += np.clip(step, -1, 1)
        if np.max(np.abs(step), initial=0) < _TOLERANCE:
            return _with_errors(strengths, information, free)
    raise ValueError(
        "no finite ratings: some players won or lost every game against the others, or never met them: "
        "give a prior above 0, or more games"
    )


def _with_errors(strengths: np.ndarray, information: np.ndarray, free: np.ndarray) -> Ratings:
    error = np.zeros(len(strengths))
    error[free] = np.sqrt(np.diag(np.linalg.inv(information[np.ix_(free, free)])))
    return Ratings(ELO * strengths, ELO * error)
