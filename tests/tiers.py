"""Which parameters of a test the default tier runs: a few that differ in kind; the slow tier runs all."""

import pytest

from rlhf_jax.distributed.runtime import compiler_options

# Tests compile without optimisation, which long training is quicker with.
OPTIMIZED = {**compiler_options(), "xla_backend_optimization_level": 3}


def few(names, *kept):
    """The parameters `names` (tuples for several arguments), of which all but `kept` are slow."""
    names = list(names)
    if unknown := set(kept) - set(names):
        raise ValueError(f"{sorted(map(str, unknown))} are not among the parameters {names}")
    values = [name if isinstance(name, tuple) else (name,) for name in names]
    marks = [() if name in kept else (pytest.mark.slow,) for name in names]
    return [pytest.param(*value, marks=mark) for value, mark in zip(values, marks, strict=True)]
