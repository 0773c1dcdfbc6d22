"""Returns and advantages against rlax, in float64, and in float32 to its precision."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import kernels

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[2] / "golden" / "kernels_rlax.npz"))
TOLERANCE = {np.float64: 1e-12, np.float32: 2e-6}


def arguments(function, dtype):
    prefix = f"{function}/"
    found = {name[len(prefix) :]: x for name, x in GOLDEN.items() if name.startswith(prefix)}
    return {n: jnp.asarray(x, dtype if x.dtype.kind == "f" else np.int32) for n, x in found.items()}


def everywhere(values):
    return jnp.ones(values.shape[:2], bool)


def gae(a):
    values = a["values"]
    return kernels.generalized_advantage_estimation(
        a["r_t"], values[:, :-1], a["discount_t"], values[:, -1], everywhere(a["r_t"]), gae_lambda=0.9
    )[0]


def with_next_values(kernel, **options):
    """rlax's returns take V(s_{t+1}) only; V(s_0) is not used by them, nor by ours."""

    def call(a):
        v_t = a["v_t"]
        values = jnp.concatenate([jnp.zeros_like(v_t[:, :1]), v_t[:, :-1]], axis=1)
        return kernel(a["r_t"], values, a["discount_t"], v_t[:, -1], everywhere(v_t), **options)

    return call


def discounted(a):
    return kernels.discounted_returns(a["r_t"], a["discount_t"], a["v_t"][:, -1], everywhere(a["r_t"]))


def vtrace(a, **options):
    return kernels.vtrace(
        jnp.log(a["rho_tm1"]),
        a["r_t"],
        a["v_tm1"],
        a["discount_t"],
        a["v_t"][:, -1],
        everywhere(a["r_t"]),
        lambda_=0.9,
        **options,
    )


def retrace_errors(a):
    """rlax gives Q^ret - Q; its step t+1 is our next row."""
    q_taken = jnp.take_along_axis(a["q_tm1"], a["a_tm1"][..., None], axis=-1)[..., 0]
    q_next = jnp.take_along_axis(a["q_t"], a["a_t"][..., None], axis=-1)[..., 0]
    pi_next = jnp.take_along_axis(a["pi_t"], a["a_t"][..., None], axis=-1)[..., 0]
    values_next = jnp.sum(a["pi_t"] * a["q_t"], axis=-1)
    shift = lambda x: jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], axis=1)  # noqa: E731
    targets = kernels.retrace(
        shift(jnp.log(pi_next / a["mu_t"])),
        a["r_t"],
        shift(q_next),
        shift(values_next),
        a["discount_t"],
        values_next[:, -1],
        everywhere(a["r_t"]),
        lambda_=0.9,
    )
    return targets - q_taken


CASES = {
    "truncated_generalized_advantage_estimation": {"output": gae},
    "lambda_returns": {"output": with_next_values(kernels.lambda_returns, lambda_=0.8)},
    "n_step_bootstrapped_returns": {"output": with_next_values(kernels.n_step_returns, n=3)},
    "discounted_returns": {"output": discounted},
    "vtrace": {"output": lambda a: vtrace(a).targets - a["v_tm1"]},
    "vtrace_td_error_and_advantage": {
        "output_errors": lambda a: vtrace(a, clip_rho=1.2, clip_pg_rho=1.1).targets - a["v_tm1"],
        "output_pg_advantage": lambda a: vtrace(a, clip_rho=1.2, clip_pg_rho=1.1).advantages,
    },
    "retrace": {"output": retrace_errors},
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("function", CASES)
def test_matches_rlax(function, dtype):
    with jax.enable_x64(dtype is np.float64):
        inputs = arguments(function, dtype)
        for output, ours in CASES[function].items():
            result = jax.jit(ours)(inputs)
            assert result.dtype == dtype
            np.testing.assert_allclose(
                result, GOLDEN[f"{function}/{output}"], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
            )
