"""Floor 4: seeds x hyperparameters of any `train(key, hyper)` in one compiled program.

    hypers = product(ppo.default_hyper(), learning_rate=[1e-4, 1e-3], gamma=[0.9, 0.99])
    results = sweep(train, jax.random.split(key, 16), hypers)
    results.write("runs/sweep/results.parquet")
    print(summarize(results, "evaluation_return"))

It knows neither environments nor models: `train(key, hyper) -> (state, history)` is all it is given.
"""

from rlhf_jax.sweep.hypers import drawn, product, zipped
from rlhf_jax.sweep.plots import plot_curves, plot_profiles
from rlhf_jax.sweep.results import Results
from rlhf_jax.sweep.running import fitting_chunk_size, sweep
from rlhf_jax.sweep.summaries import (
    Summary,
    compare,
    performance_profile,
    summarize,
)

__all__ = [
    "Results",
    "Summary",
    "compare",
    "drawn",
    "fitting_chunk_size",
    "performance_profile",
    "plot_curves",
    "plot_profiles",
    "product",
    "summarize",
    "sweep",
    "zipped",
]
