"""rlax's returns, advantages and losses on value distributions: kernels_rlax.npz."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rlax
from goldens_common import Arrays, save


def returns_calls(rng: np.random.Generator) -> dict[str, tuple[Any, Arrays, Arrays]]:
    """{function: (callable, arrays to vmap over, constants)} for returns and advantages."""
    shape = (3, 9)
    rewards, values = rng.standard_normal(shape), rng.standard_normal((3, 10))
    discounts = np.where(rng.random(shape) < 0.2, 0.0, 0.97)
    rho = np.exp(0.5 * rng.standard_normal(shape))
    q_t, pi_t = rng.standard_normal((3, 9, 4)), rng.dirichlet(np.ones(4), (3, 9))
    base = {"r_t": rewards, "discount_t": discounts}
    off_policy = base | {"v_tm1": values[:, :-1], "v_t": values[:, 1:], "rho_tm1": rho}
    actions = {"a_tm1": rng.integers(4, size=shape), "a_t": rng.integers(4, size=shape)}
    retrace = base | actions | {"q_tm1": rng.standard_normal((3, 9, 4)), "q_t": q_t, "pi_t": pi_t}
    retrace["mu_t"] = rng.uniform(0.1, 1.0, shape)
    q_and_v = {"q_t": q_t[:, :-1, 0], "v_t": values[:, 1:], "c_t": np.minimum(1, rho[:, 1:])}
    return {
        "truncated_generalized_advantage_estimation": (
            rlax.truncated_generalized_advantage_estimation,
            base | {"values": values},
            {"lambda_": 0.9},
        ),
        "lambda_returns": (rlax.lambda_returns, base | {"v_t": values[:, 1:]}, {"lambda_": 0.8}),
        "n_step_bootstrapped_returns": (
            rlax.n_step_bootstrapped_returns,
            base | {"v_t": values[:, 1:]},
            {"n": 3},
        ),
        "discounted_returns": (rlax.discounted_returns, base | {"v_t": values[:, 1:]}, {}),
        "vtrace": (rlax.vtrace, off_policy, {"lambda_": 0.9, "clip_rho_threshold": 1.0}),
        "vtrace_td_error_and_advantage": (
            rlax.vtrace_td_error_and_advantage,
            off_policy,
            {"lambda_": 0.9, "clip_rho_threshold": 1.2, "clip_pg_rho_threshold": 1.1},
        ),
        "retrace": (rlax.retrace, retrace, {"lambda_": 0.9, "eps": 0.0}),
        "general_off_policy_returns_from_q_and_v": (
            rlax.general_off_policy_returns_from_q_and_v,
            base | q_and_v,
            {},
        ),
    }


def distribution_calls(rng: np.random.Generator) -> dict[str, tuple[Any, Arrays, Arrays, str]]:
    """The same for losses on value distributions, with the name of the argument to differentiate."""
    atoms = np.linspace(-2, 2, 11)
    td = {"v_logits_tm1": rng.standard_normal((5, 11)), "v_logits_t": rng.standard_normal((5, 11))}
    td |= {"r_t": rng.standard_normal(5), "discount_t": np.array([0.9, 0.0, 0.99, 0.9, 0.5])}
    quantiles = {"dist_src": rng.standard_normal((5, 8)), "dist_target": rng.standard_normal((5, 6))}
    quantile_constants = {"tau_src": (np.arange(8) + 0.5) / 8}
    project = {"z_p": 2 * rng.standard_normal((5, 11)), "probs": rng.dirichlet(np.ones(11), 5)}
    loss = rlax.quantile_regression_loss
    return {
        "categorical_td_learning": (
            rlax.categorical_td_learning,
            td,
            {"v_atoms_tm1": atoms, "v_atoms_t": atoms},
            "v_logits_tm1",
        ),
        "categorical_l2_project": (rlax.categorical_l2_project, project, {"z_q": atoms}, "probs"),
        "quantile_regression_loss": (loss, quantiles, quantile_constants | {"huber_param": 0.0}, "dist_src"),
        "quantile_huber_loss": (loss, quantiles, quantile_constants | {"huber_param": 1.0}, "dist_src"),
    }


def make_kernels() -> None:
    """kernels_rlax.npz."""
    rng = np.random.default_rng(1)
    saved: Arrays = {}

    def call(name: str, function: Any, arrays: Arrays, constants: Arrays) -> Any:
        saved.update({f"{name}/{key}": value for key, value in (arrays | constants).items()})
        return jax.vmap(lambda rows: function(**rows, **constants))(jax.tree.map(jnp.asarray, arrays))

    for name, (function, arrays, constants) in returns_calls(rng).items():
        output = call(name, function, arrays, constants)
        named = output._asdict() if hasattr(output, "_asdict") else {"": output}
        saved |= {f"{name}/output{'_' * bool(key)}{key}": value for key, value in named.items()}
    for name, (function, arrays, constants, leaf) in distribution_calls(rng).items():
        saved[f"{name}/output"] = call(name, function, arrays, constants)

        def total(value: Any, function=function, arrays=arrays, constants=constants, leaf=leaf) -> Any:
            return jnp.sum(jax.vmap(lambda rows: function(**rows, **constants))(arrays | {leaf: value}))

        saved[f"{name}/grad"] = jax.grad(total)(jnp.asarray(arrays[leaf]))
    save("kernels_rlax", saved, {})
