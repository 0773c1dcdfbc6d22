"""Every loss on rows against a naive oracle and the laws that all of them share, one table of cases."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from tiers import few

from rlhf_jax import losses
from rlhf_jax.algorithms import preference

BETA, SMOOTHING = 0.3, 0.1
COLUMNS = ("pc", "pr", "rc", "rr")
Rows = dict[str, Any]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def smoothed(x: float, e: float = SMOOTHING) -> float:
    return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x)


def odds(p: float) -> float:
    return p / (1 - p)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One row as the formulas name it: log-ratios c, r; log-probabilities lc, lr; their means per token."""

    pc: float
    pr: float
    rc: float
    rr: float
    nc: int
    nr: int
    flag: bool
    c = property(lambda self: self.pc - self.rc)
    r = property(lambda self: self.pr - self.rr)
    d = property(lambda self: self.c - self.r)
    mean_c = property(lambda self: self.pc / self.nc)
    mean_r = property(lambda self: self.pr / self.nr)


@dataclasses.dataclass(frozen=True)
class Case:
    loss: Callable[..., Any]
    oracle: Callable[[Pair, float], float]
    couples_rows: bool = False
    takes_weights: bool = True


def pairs_of(x: Rows) -> losses.PairLogps:
    return losses.PairLogps(*(x[name] for name in COLUMNS), x["nc"], x["nr"], x["flag"])


def on_pairs(loss: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    return lambda x, **kwargs: loss(pairs_of(x), **fixed, **kwargs)


def reference_free(loss: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    def without_reference(x: Rows, **kwargs: Any) -> Any:
        pairs = dataclasses.replace(pairs_of(x), ref_chosen=None, ref_rejected=None)
        return loss(pairs, **fixed, **kwargs)

    return without_reference


def bradley_terry(x: Rows, beta: Any, **kwargs: Any) -> Any:
    return losses.bradley_terry_loss(x["pc"], x["pr"], margin=beta * x["nc"], centring=beta, **kwargs)


def nll_and_contrast(x: Rows, **kwargs: Any) -> Any:
    return losses.cpo_loss(
        losses.PairLogps(x["pc"], x["pr"]), nll_weight=1 / x["nc"], label_smoothing=SMOOTHING, **kwargs
    )


def discopop(p: Pair, b: float) -> float:
    m = sigmoid(b * p.d / 0.5)
    return (1 - m) * -log_sigmoid(b * p.d) + m * math.exp(-b * p.d)


def alpha_reward(mean_logp: float, alpha: float = 0.25) -> float:
    return (1 - math.exp(-alpha * mean_logp)) / alpha


E = SMOOTHING
CASES = {
    "dpo": Case(on_pairs(losses.dpo_loss, label_smoothing=E), lambda p, b: smoothed(b * p.d)),
    "robust": Case(
        on_pairs(losses.robust_dpo_loss, label_smoothing=E),
        lambda p, b: (-(1 - E) * log_sigmoid(b * p.d) + E * log_sigmoid(-b * p.d)) / (1 - 2 * E),
    ),
    "hinge": Case(on_pairs(losses.hinge_loss), lambda p, b: max(0, 1 - b * p.d)),
    "ipo": Case(on_pairs(losses.ipo_loss), lambda p, b: (p.c / p.nc - p.r / p.nr - 1 / (2 * b)) ** 2),
    "exo": Case(
        on_pairs(losses.exo_loss, label_smoothing=E),
        lambda p, b: (
            sigmoid(b * p.d) * (log_sigmoid(b * p.d) - math.log(1 - E))
            + sigmoid(-b * p.d) * (log_sigmoid(-b * p.d) - math.log(E))
        ),
    ),
    "nca": Case(
        on_pairs(losses.nca_loss),
        lambda p, b: -log_sigmoid(b * p.c) - 0.5 * log_sigmoid(-b * p.c) - 0.5 * log_sigmoid(-b * p.r),
    ),
    "bco_pair": Case(
        on_pairs(losses.bco_pair_loss), lambda p, b: -log_sigmoid(b * p.c) - log_sigmoid(-b * p.r)
    ),
    "sppo": Case(
        on_pairs(losses.sppo_loss), lambda p, b: (p.c - 1 / (2 * b)) ** 2 + (p.r + 1 / (2 * b)) ** 2
    ),
    "apo_zero": Case(on_pairs(losses.apo_zero_loss), lambda p, b: 1 - sigmoid(b * p.c) + sigmoid(b * p.r)),
    "apo_down": Case(on_pairs(losses.apo_down_loss), lambda p, b: sigmoid(b * p.c) + 1 - sigmoid(b * p.d)),
    "discopop": Case(on_pairs(losses.discopop_loss, tau=0.5), discopop),
    "length_normalized": Case(
        on_pairs(losses.length_normalized_dpo_loss),
        lambda p, b: -log_sigmoid(b * (p.c / p.nc - p.r / p.nr)),
    ),
    "orpo": Case(
        reference_free(losses.orpo_loss, nll_weight=0.7),
        lambda p, b: (
            -0.7 * p.mean_c - b * log_sigmoid(math.log(odds(math.exp(p.mean_c)) / odds(math.exp(p.mean_r))))
        ),
    ),
    "cpo": Case(nll_and_contrast, lambda p, b: smoothed(b * (p.pc - p.pr)) - p.mean_c),
    "simpo": Case(
        reference_free(losses.simpo_loss, gamma=0.5, nll_weight=0.2, label_smoothing=E),
        lambda p, b: smoothed(b * (p.mean_c - p.mean_r) - 0.5) - 0.2 * p.mean_c,
    ),
    "alpha_po": Case(
        reference_free(losses.alpha_po_loss, gamma=0.5, alpha=0.25),
        lambda p, b: -log_sigmoid(b * (alpha_reward(p.mean_c) - alpha_reward(p.mean_r)) - 0.5),
    ),
    "xpo": Case(
        on_pairs(losses.xpo_loss, alpha=0.1),
        lambda p, b: -log_sigmoid(b * p.d) + 0.1 * (p.pc if p.flag else p.pr),
    ),
    "kto": Case(
        lambda x, **kwargs: losses.kto_loss(
            x["pc"],
            x["rc"],
            x["flag"],
            jnp.asarray(0.7),
            desirable_weight=1.5,
            undesirable_weight=0.5,
            **kwargs,
        ),
        lambda p, b: 1.5 * (1 - sigmoid(b * (p.c - 0.7))) if p.flag else 0.5 * (1 - sigmoid(b * (0.7 - p.c))),
        takes_weights=False,
    ),
    "bco": Case(
        lambda x, **kwargs: losses.bco_loss(x["pc"], x["rc"], x["flag"], shift=0.4, **kwargs),
        lambda p, b: -log_sigmoid(b * p.c - 0.4) if p.flag else -log_sigmoid(0.4 - b * p.c),
    ),
    "bradley_terry": Case(
        bradley_terry,
        lambda p, b: -log_sigmoid(p.pc - p.pr - b * p.nc) + b * (p.pc + p.pr) ** 2,
        takes_weights=False,
    ),
    "aot": Case(
        on_pairs(losses.aot_loss, label_smoothing=E),
        lambda p, b: math.nan,
        couples_rows=True,
        takes_weights=False,
    ),
    "aot_unpaired": Case(
        on_pairs(losses.aot_unpaired_loss), lambda p, b: math.nan, couples_rows=True, takes_weights=False
    ),
}
EACH = pytest.mark.parametrize("name", CASES)
# Of the other laws the default tier runs those of one loss of each kind.
EACH_KIND = pytest.mark.parametrize(
    "name", few(CASES, "dpo", "ipo", "orpo", "simpo", "kto", "bradley_terry", "aot")
)
EACH_ALONE = pytest.mark.parametrize("name", [n for n, case in CASES.items() if not case.couples_rows])


def make_rows(count: int = 6, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    policy = -rng.gamma(6.0, 1.0, (2, count))
    ref = policy + 2 * rng.standard_normal((2, count))
    rows = {"pc": policy[0], "pr": policy[1], "rc": ref[0], "rr": ref[1]}
    rows |= {"nc": rng.integers(2, 9, count), "nr": rng.integers(2, 9, count)}
    return rows | {"flag": np.arange(count) % 3 > 0}


@functools.cache
def compiled(name: str) -> Callable[..., Any]:
    """rows, beta, mask, denominator -> ((loss, metrics), gradients by the four log-probabilities)."""

    def call(logps: Rows, rest: Rows, beta: Any, mask: Any, denominator: Any) -> Any:
        return CASES[name].loss(logps | rest, beta=beta, mask=mask, denominator=denominator)

    return jax.jit(jax.value_and_grad(call, has_aux=True))


def run(name: str, rows: Rows, mask: Any = None, denominator: float | None = None, beta: float = BETA) -> Any:
    count = len(rows["pc"])
    mask = np.ones(count, bool) if mask is None else mask
    denominator = float(np.sum(mask)) if denominator is None else denominator
    logps = {column: jnp.asarray(rows[column]) for column in COLUMNS}
    rest = {column: jnp.asarray(rows[column]) for column in ("nc", "nr", "flag")}
    (loss, metrics), grads = compiled(name)(logps, rest, jnp.asarray(beta), jnp.asarray(mask), denominator)
    return float(loss), metrics, {column: np.asarray(grads[column]) for column in COLUMNS}


def oracle_mean(name: str, rows: Rows) -> float:
    if name == "aot":
        upper, lower = np.sort(rows["pc"] - rows["pr"]), np.sort(rows["rc"] - rows["rr"])
        return float(np.mean([smoothed(BETA * (u - v)) for u, v in zip(upper, lower, strict=True)]))
    if name == "aot_unpaired":
        upper, lower = np.sort(rows["pc"] - rows["rc"]), np.sort(rows["pr"] - rows["rr"])
        return float(np.mean([-log_sigmoid(BETA * (u - v)) for u, v in zip(upper, lower, strict=True)]))
    pairs = [Pair(**{key: column[i] for key, column in rows.items()}) for i in range(len(rows["pc"]))]
    return sum(CASES[name].oracle(pair, BETA) for pair in pairs) / len(pairs)


@EACH
def test_value_and_gradient_match_the_naive_oracle(name: str) -> None:
    rows, step = make_rows(), 1e-6
    with jax.enable_x64(True):
        loss, metrics, grads = run(name, rows)
    assert loss == pytest.approx(oracle_mean(name, rows), rel=1e-12)
    assert float(metrics["loss"]) == loss
    for column in COLUMNS:
        for i in range(6):
            moved = [rows | {column: rows[column] + sign * step * np.eye(6)[i]} for sign in (1, -1)]
            slope = (oracle_mean(name, moved[0]) - oracle_mean(name, moved[1])) / (2 * step)
            assert grads[column][i] == pytest.approx(slope, rel=1e-5, abs=1e-8)


@EACH
def test_masked_rows_may_hold_nan_and_change_nothing(name: str) -> None:
    rows, mask = make_rows(), np.array([1, 0, 1, 1, 0, 1], bool)
    kept = {key: column[mask] for key, column in rows.items()}
    poisoned = rows | {key: np.where(mask, rows[key], bad) for key, bad in zip(COLUMNS, POISON, strict=True)}
    poisoned |= {"nc": np.where(mask, rows["nc"], 0)}
    with jax.enable_x64(True):
        loss, metrics, grads = run(name, poisoned, mask)
        kept_loss, kept_metrics, kept_grads = run(name, kept)
    assert loss == pytest.approx(kept_loss, rel=1e-12)
    for key, value in metrics.items():
        assert float(value) == pytest.approx(float(kept_metrics[key]), rel=1e-12), key
    for column in COLUMNS:
        np.testing.assert_allclose(grads[column][mask], kept_grads[column], rtol=1e-12, atol=1e-15)
        np.testing.assert_array_equal(grads[column][~mask], 0)


POISON = (np.nan, np.inf, -np.inf, np.nan)


@EACH_ALONE
def test_micro_batches_sum_to_the_batch(name: str) -> None:
    rows = make_rows()
    with jax.enable_x64(True):
        loss, metrics, grads = run(name, rows)
        parts = [
            run(name, {k: v[part] for k, v in rows.items()}, denominator=6.0)
            for part in (slice(0, 4), slice(4, 6))
        ]
    assert loss == pytest.approx(sum(part[0] for part in parts), rel=1e-12)
    for key, value in metrics.items():
        assert float(value) == pytest.approx(sum(float(part[1][key]) for part in parts), rel=1e-12), key
    for column in COLUMNS:
        joined = np.concatenate([part[2][column] for part in parts])
        np.testing.assert_allclose(grads[column], joined, rtol=1e-12, atol=1e-15)


@EACH_KIND
def test_order_of_rows_does_not_matter(name: str) -> None:
    rows, order = make_rows(), np.array([3, 1, 5, 0, 4, 2])
    with jax.enable_x64(True):
        loss, _, grads = run(name, rows)
        permuted_loss, _, permuted_grads = run(name, {k: v[order] for k, v in rows.items()})
    assert loss == pytest.approx(permuted_loss, rel=1e-12)
    for column in COLUMNS:
        np.testing.assert_allclose(grads[column][order], permuted_grads[column], rtol=1e-9, atol=1e-15)


@EACH_KIND
def test_extreme_log_ratios_stay_finite(name: str) -> None:
    # Log-probabilities are at most 0; the ratios reach 1e4 on either side.
    signs = {"c": np.repeat([-1, 1], 3), "r": np.tile([-1, 0, 1], 2)}
    rows = make_rows()
    for side, sign in signs.items():
        rows["p" + side] = np.where(sign < 0, -1e4, 0.0).astype(np.float32)
        rows["r" + side] = np.where(sign > 0, -1e4, 0.0).astype(np.float32)
    rows |= {"nc": np.ones(6, int), "nr": np.ones(6, int)}
    loss, metrics, grads = run(name, rows)
    assert math.isfinite(loss)
    assert all(math.isfinite(float(value)) for value in metrics.values())
    assert all(np.isfinite(grad).all() for grad in grads.values())


@EACH_KIND
def test_bfloat16_inputs_are_computed_in_float32(name: str) -> None:
    rows = make_rows()
    short = {k: jnp.asarray(v, jnp.bfloat16) if k in COLUMNS else v for k, v in rows.items()}
    rounded = {k: np.asarray(v, np.float32) if k in COLUMNS else v for k, v in short.items()}
    loss, metrics, grads = run(name, short)
    expected, _, expected_grads = run(name, rounded)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert metrics["loss"].dtype == jnp.float32
    for column in COLUMNS:
        assert grads[column].dtype == jnp.bfloat16
        np.testing.assert_allclose(
            grads[column].astype(np.float32), expected_grads[column], rtol=1e-2, atol=1e-6
        )


@EACH_KIND
def test_beta_may_be_traced_and_mapped(name: str) -> None:
    rows, betas = jax.tree.map(jnp.asarray, make_rows()), jnp.asarray([0.1, 0.3, 2.0])
    traces = []

    @jax.jit
    def mapped(values: Any) -> Any:
        traces.append(None)
        return jax.vmap(lambda beta: CASES[name].loss(rows, beta=beta)[0])(values)

    together, again = mapped(betas), mapped(betas + 1)
    assert len(traces) == 1
    assert not np.allclose(together, again)
    for beta, value in zip(betas, together, strict=True):
        assert float(value) == pytest.approx(run(name, make_rows(), beta=float(beta))[0], rel=2e-5)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.takes_weights])
def test_weights_scale_rows(name: str) -> None:
    rows = jax.tree.map(jnp.asarray, make_rows())
    weights = np.array([2.0, 0.0, 1.0, 1.0, 0.5, 3.0])
    singles = [
        float(CASES[name].loss(jax.tree.map(lambda x, i=i: x[i : i + 1], rows), beta=BETA)[0])
        for i in range(6)
    ]
    loss, metrics = CASES[name].loss(rows, beta=BETA, weights=jnp.asarray(weights))
    assert float(loss) == pytest.approx(float(np.sum(weights * singles)) / 6, rel=1e-5)
    assert float(metrics["loss"]) == float(loss)


@functools.cache
def compiled_together() -> Callable[..., Any]:
    """Every case in one program: {name: ((loss, metrics), gradients)}."""

    def call(name: str, logps: Rows, rest: Rows, *traced: Any) -> Any:
        beta, mask, denominator = traced
        return CASES[name].loss(logps | rest, beta=beta, mask=mask, denominator=denominator)

    def everything(logps: Rows, rest: Rows, *traced: Any) -> Any:
        grad = jax.value_and_grad(call, argnums=1, has_aux=True)
        return {name: grad(name, logps, rest, *traced) for name in CASES}

    return jax.jit(everything)


def run_together(rows: Rows, beta: float, mask: Any, denominator: float) -> dict[str, Any]:
    logps = {column: jnp.asarray(rows[column]) for column in COLUMNS}
    rest = {column: jnp.asarray(rows[column]) for column in ("nc", "nr", "flag")}
    traced = (jnp.asarray(beta), jnp.asarray(mask), jnp.asarray(denominator))
    return jax.tree.map(np.asarray, compiled_together()(logps, rest, *traced))


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**20),
    spread=st.sampled_from([1.0, 30.0]),
    beta=st.floats(0.01, 2.0),
    mask=st.lists(st.booleans(), min_size=6, max_size=6).map(np.array),
    part=st.lists(st.booleans(), min_size=6, max_size=6).map(np.array),
    order=st.permutations(range(6)).map(np.array),
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_laws_hold_for_any_batch(
    seed: int, spread: float, beta: float, mask: Any, part: Any, order: Any, bad: float
) -> None:
    rows = make_rows(seed=seed)
    rows |= {column: spread * rows[column] for column in COLUMNS}
    poisoned = rows | {column: np.where(mask, rows[column], bad) for column in COLUMNS}
    poisoned |= {length: np.where(mask, rows[length], 0) for length in ("nc", "nr")}
    count = float(mask.sum())
    with jax.enable_x64(True):
        clean = run_together(rows, beta, mask, count)
        dirty = run_together(poisoned, beta, mask, count)
        permuted = run_together({k: v[order] for k, v in poisoned.items()}, beta, mask[order], count)
        halves = [run_together(poisoned, beta, mask & half, count) for half in (part, ~part)]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    for name, case in CASES.items():
        (metrics, grads), (loss_metrics, dirty_grads) = [(x[name][0][1], x[name][1]) for x in (clean, dirty)]
        jax.tree.map(close, loss_metrics, metrics)
        jax.tree.map(close, dirty_grads, grads)
        assert all((grad[~mask] == 0).all() for grad in dirty_grads.values()), name
        jax.tree.map(close, permuted[name][0], dirty[name][0])
        jax.tree.map(lambda x, y: close(x, y[order]), permuted[name][1], dirty_grads)
        if not case.couples_rows:
            jax.tree.map(
                lambda whole, *parts: close(sum(parts), whole), dirty[name], *(h[name] for h in halves)
            )


def test_every_pair_loss_has_its_oracle() -> None:
    assert preference.pair_losses().keys() <= CASES.keys()
