"""Scaling laws of pre-training: loss against parameters N, tokens D and operations C = 6 N D.

    Kaplan et al. 2020, eq. 1.5:        L(N, D) = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D
    Hoffmann et al. 2022, approach 3:   L(N, D) = E + A / N^alpha + B / D^beta

One run is one point (N, D, L). Both laws are fitted alike: the least Huber loss of the error of log L, from
the best of a grid of starts. Hoffmann et al. take L-BFGS; a trust region of Gauss-Newton steps comes to the
same minimum in a tenth of the time, and L-BFGS stops short on Kaplan's form. For intervals, draw runs anew:
`statistics.bootstrap_intervals` of a statistic that fits.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import least_squares

OPERATIONS = 6
"""Operations of training for each parameter and token (Kaplan et al. 2020, section 2.1)."""
HUBER_DELTA = 1e-3
"""Error of log L beyond which it counts linearly (Hoffmann et al. 2022)."""
EXPONENTS = (0.01, 3.0)
"""Range of the exponents; one at its end is not determined by the runs."""

LEAST_E = 1e-3
"""Nats below which E is as good as 0, where a fit ends that finds no bend in the losses."""

_GRID = np.geomspace(0.05, 2.0, 8)
_KEPT = 4  # starts, of the grid's best, that are followed; one in four stays at a kink of the Huber loss
_LEAST = 1e-9  # of coefficients: 0 has no logarithm
_LEAST_SHARE = 0.02  # of the loss: what a start gives to a term for which least squares finds less


@dataclasses.dataclass(frozen=True)
class Chinchilla:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, approach 3).

    Attributes:
      E: loss that neither parameters nor tokens take away.
      A: loss of a model of one parameter above it.
      B: loss after one token above it.
      alpha: exponent of parameters.
      beta: exponent of tokens.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __call__(self, params: ArrayLike, tokens: ArrayLike) -> np.ndarray:
        """L(N, D); either may be infinite."""
        n, d = np.asarray(params, np.float64), np.asarray(tokens, np.float64)
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    def optimum(self, flops: float) -> tuple[float, float]:
        """(N, D) of least loss with 6 N D = C.

        N = G (C / 6)^(beta / (alpha + beta)),  G = (alpha A / (beta B))^(1 / (alpha + beta))
        """
        log_scale = math.log(self.alpha / self.beta) + math.log(self.A) - math.log(self.B)
        log_budget = math.log(flops / OPERATIONS)
        params = _exp((log_scale + self.beta * log_budget) / (self.alpha + self.beta))
        return params, flops / OPERATIONS / params

    @property
    def params_exponent(self) -> float:
        """a of N = G (C / 6)^a at the optimum."""
        return self.beta / (self.alpha + self.beta)


@dataclasses.dataclass(frozen=True)
class Kaplan:
    """L(N, D) = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D (Kaplan et al. 2020, eq. 1.5).

    Attributes:
      log_N_c: log of the scale of parameters; with unlimited tokens L = (N_c / N)^alpha_N.
      log_D_c: log of the scale of tokens; with unlimited parameters L = (D_c / D)^alpha_D.
      alpha_N: exponent of parameters.
      alpha_D: exponent of tokens.
    """

    log_N_c: float
    log_D_c: float
    alpha_N: float
    alpha_D: float

    @property
    def ratio(self) -> float:
        """alpha_N / alpha_D."""
        return self.alpha_N / self.alpha_D

    def __call__(self, params: ArrayLike, tokens: ArrayLike) -> np.ndarray:
        """L(N, D); either may be infinite."""
        log_n, log_d = (np.log(np.asarray(values, np.float64)) for values in (params, tokens))
        terms = self.ratio * (self.log_N_c - log_n), self.log_D_c - log_d
        return np.exp(self.alpha_D * np.logaddexp(*terms))

    def optimum(self, flops: float) -> tuple[float, float]:
        """(N, D) of least loss with 6 N D = C, where the derivative of the bracket is 0.

        N^(r + 1) = r N_c^r (C / 6) / D_c,  r = alpha_N / alpha_D
        """
        budget, r = flops / OPERATIONS, self.ratio
        params = _exp((math.log(r) + r * self.log_N_c + math.log(budget) - self.log_D_c) / (r + 1))
        return params, budget / params

    @property
    def params_exponent(self) -> float:
        """a of the optimum's N, which grows as C^a."""
        return 1 / (self.ratio + 1)


Law = Chinchilla | Kaplan


# Fits ----------------------------------------------------------------------------------------------


def fit_chinchilla(params: ArrayLike, tokens: ArrayLike, losses: ArrayLike) -> Chinchilla:
    """Chinchilla's law fitted to runs (Hoffmann et al. 2022, approach 3).

    min over (a, b, e, alpha, beta) of  sum_i Huber(LSE(a - alpha log N_i, b - beta log D_i, e) - log L_i)

    Args:
      params: of each run [R].
      tokens: that each has seen [R].
      losses: of each [R], above 0.

    Raises:
      ValueError: fewer than five runs, or fewer than three numbers of parameters or of tokens.
    """
    n, d, target = _points(params, tokens, losses, numbers=5)
    if min(len(np.unique(n)), len(np.unique(d))) < 3:
        raise ValueError("a fit of E, A, B, alpha and beta needs three sizes and three numbers of tokens")
    x, y = n - n.mean(), d - d.mean()
    e, a, b, alpha, beta = _fit(_CHINCHILLA, x, y, target)
    return Chinchilla(
        E=e,
        A=_exp(math.log(a) + alpha * n.mean()),
        B=_exp(math.log(b) + beta * d.mean()),
        alpha=alpha,
        beta=beta,
    )


def fit_kaplan(params: ArrayLike, tokens: ArrayLike, losses: ArrayLike) -> Kaplan:
    """Kaplan's law of parameters and tokens (eq. 1.5) fitted to runs, as `fit_chinchilla` fits its own.

    Args:
      params: of each run [R].
      tokens: that each has seen [R].
      losses: of each [R], above 0.

    Raises:
      ValueError: fewer than four runs, or one number of parameters or of tokens only.
    """
    n, d, target = _points(params, tokens, losses, numbers=4)
    if min(len(np.unique(n)), len(np.unique(d))) < 2:
        raise ValueError("a fit of N_c, D_c, alpha_N and alpha_D needs two sizes and two numbers of tokens")
    x, y = n - n.mean(), d - d.mean()
    of_params, of_tokens, ratio, alpha_d = _fit(_KAPLAN, x, y, target)
    return Kaplan(
        log_N_c=float(math.log(of_params) / (alpha_d * ratio) + n.mean()),
        log_D_c=float(math.log(of_tokens) / alpha_d + d.mean()),
        alpha_N=ratio * alpha_d,
        alpha_D=alpha_d,
    )


def undetermined(law: Law) -> list[str]:
    """Numbers of a fit that are at an end of their range: the runs do not say what they are."""
    if isinstance(law, Chinchilla):
        pairs = {"alpha": law.alpha, "beta": law.beta}
    else:
        pairs = {"alpha_N / alpha_D": law.ratio, "alpha_D": law.alpha_D}
    low, high = EXPONENTS
    found = ["E"] if isinstance(law, Chinchilla) and law.E < LEAST_E else []
    return found + [name for name, value in pairs.items() if value < low * 1.001 or value > high * 0.999]


@dataclasses.dataclass(frozen=True)
class _Form:
    """log L = s log sum_k c_k^(1 / s) exp(t_k): both laws, by coefficients c and two exponents (u, v).

    c_k is the loss that the k-th term would give alone at mean log N and log D: it does not move with s.

    Attributes:
      terms_fn: (u, v, x, y) -> t [K, R], without coefficients.
      power_fn: (u, v) -> s.
      slopes_fn: (power, x, y, shares of the terms [K, R], d log L / ds [R]) -> d log L / d(u, v) [2, R].
    """

    terms_fn: Callable[[float, float, np.ndarray, np.ndarray], np.ndarray]
    power_fn: Callable[[float, float], float]
    slopes_fn: Callable[[float, np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]

    def logs(self, theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(log L [R], its derivatives [K + 2, R]) at theta = (c, u, v)."""
        *_, u, v = theta
        power, logs = self.power_fn(u, v), np.log(theta[:-2, None])
        terms = logs / power + self.terms_fn(u, v, x, y)
        total = np.logaddexp.reduce(terms, axis=0)
        shares = np.exp(terms - total)
        # What s moves: the power of the sum, and that of each coefficient in it.
        slopes = self.slopes_fn(power, x, y, shares, total - np.sum(shares * logs, axis=0) / power)
        return power * total, np.concatenate([shares / theta[:-2, None], slopes])

    def start(self, u: float, v: float, x: np.ndarray, y: np.ndarray, target: np.ndarray) -> np.ndarray:
        """theta whose coefficients are linear least squares of the relative error, given the exponents."""
        columns = np.exp(self.terms_fn(u, v, x, y) - target / self.power_fn(u, v)).T
        found = np.linalg.lstsq(columns, np.ones(len(x)), rcond=None)[0]
        least = _LEAST_SHARE / np.mean(columns, axis=0)
        return np.array([*np.maximum(found, least) ** self.power_fn(u, v), u, v])


_CHINCHILLA = _Form(
    lambda u, v, x, y: np.stack([np.zeros_like(x), -u * x, -v * y]),
    lambda u, v: 1.0,
    lambda power, x, y, shares, of_power: np.stack([-x * shares[1], -y * shares[2]]),
)
_KAPLAN = _Form(
    lambda u, v, x, y: np.stack([-u * x, -y]),
    lambda u, v: v,
    lambda power, x, y, shares, of_power: np.stack([-power * x * shares[0], of_power]),
)


def _fit(form: _Form, x: np.ndarray, y: np.ndarray, target: np.ndarray) -> list[float]:
    def errors(theta: np.ndarray) -> np.ndarray:
        return form.logs(theta, x, y)[0] - target

    def huber(theta: np.ndarray) -> float:
        size = np.abs(errors(theta)) / HUBER_DELTA
        return float(np.sum(np.where(size <= 1, size**2, 2 * size - 1)))

    starts = [form.start(u, v, x, y, target) for u in _GRID for v in _GRID]
    coefficients = [_LEAST] * (len(starts[0]) - 2), [math.inf] * (len(starts[0]) - 2)
    bounds = [[*of_terms, end, end] for of_terms, end in zip(coefficients, EXPONENTS, strict=True)]
    found = [
        least_squares(
            errors,
            theta,
            jac=lambda theta: form.logs(theta, x, y)[1].T,  # pyright: ignore[reportArgumentType]
            bounds=bounds,
            loss="huber",
            f_scale=HUBER_DELTA,
            x_scale="jac",
            xtol=1e-8,
            ftol=1e-10,
            gtol=1e-14,
            max_nfev=200,
        ).x
        for theta in sorted(starts, key=huber)[:_KEPT]
    ]
    return min(found, key=huber).tolist()


def _exp(log: float) -> float:
    """As far as a float goes: resampled runs may say anything."""
    return math.exp(min(max(float(log), -700.0), 700.0))


def _points(*columns: ArrayLike, numbers: int) -> list[np.ndarray]:
    """Logs of columns of one length."""
    arrays = [np.asarray(column, np.float64) for column in columns]
    if any(array.ndim != 1 or len(array) != len(arrays[0]) for array in arrays):
        raise ValueError(f"expected columns of one length, not {[array.shape for array in arrays]}")
    if len(arrays[0]) < numbers:
        raise ValueError(f"a fit of {numbers} numbers needs as many runs, not {len(arrays[0])}")
    if not all(np.all(np.isfinite(array) & (array > 0)) for array in arrays):
        raise ValueError("parameters, tokens and losses must be above 0 and finite")
    return [np.log(array) for array in arrays]


# Equal budgets -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class IsoFLOP:
    """The parabola through runs of about as many operations (Hoffmann et al. 2022, approach 2).

        L = loss + curvature (log N - log params)^2

    Attributes:
      flops: geometric mean over the runs.
      runs: their places in the arrays.
      params: N at the minimum.
      loss: there.
      curvature: above 0 where there is a minimum; else `params` is where the loss is highest.
      inside: the minimum lies between the smallest and the largest model, so that it was not extrapolated.
    """

    flops: float
    runs: tuple[int, ...]
    params: float
    loss: float
    curvature: float
    inside: bool

    def __call__(self, params: ArrayLike) -> np.ndarray:
        """The parabola at N."""
        return self.loss + self.curvature * np.log(np.asarray(params, np.float64) / self.params) ** 2


def fit_isoflops(
    params: ArrayLike, tokens: ArrayLike, losses: ArrayLike, *, gap: float = 0.15
) -> list[IsoFLOP]:
    """A parabola in log N for each budget with which three sizes or more were trained, by rising budget.

    Args:
      params: of each run [R].
      tokens: that each has seen [R].
      losses: of each [R].
      gap: budgets belong together where each is at most so much above the next smaller one, as a share.
    """
    n, d, loss = (np.asarray(values, np.float64) for values in (params, tokens, losses))
    flops = OPERATIONS * n * d
    order = np.argsort(flops, kind="stable")
    ends = np.flatnonzero(np.diff(np.log(flops[order])) > math.log1p(gap)) + 1
    groups = [group for group in np.split(order, ends) if len(np.unique(n[group])) >= 3]
    return [_parabola(flops[group], n[group], loss[group], group) for group in groups]


def _parabola(flops: np.ndarray, n: np.ndarray, loss: np.ndarray, group: np.ndarray) -> IsoFLOP:
    middle = float(np.mean(np.log(n)))
    curvature, slope, level = map(float, np.polyfit(np.log(n) - middle, loss, 2))
    place = -slope / (2 * curvature) if curvature else math.inf
    params = _exp(middle + place)  # of a straight line: as far away as a float can say
    return IsoFLOP(
        flops=float(np.exp(np.mean(np.log(flops)))),
        runs=tuple(group.tolist()),
        params=params,
        loss=level + slope * place / 2 if curvature else -math.inf,
        curvature=curvature,
        inside=curvature > 0 and bool(n.min() <= params <= n.max()),
    )


def fit_power_law(x: ArrayLike, y: ArrayLike) -> tuple[float, float]:
    """(k, a) of y = k x^a, by least squares of the logs.

    Raises:
      ValueError: fewer than two different x.
    """
    log_x, log_y = (np.log(np.asarray(values, np.float64)) for values in (x, y))
    if len(np.unique(log_x)) < 2:
        raise ValueError("a power law needs two different points")
    exponent = float(np.cov(log_x, log_y, bias=True)[0, 1] / np.var(log_x))
    return math.exp(float(np.mean(log_y)) - exponent * float(np.mean(log_x))), exponent
