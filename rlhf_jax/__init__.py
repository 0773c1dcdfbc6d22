"""rlhf_jax: RLHF, and the reinforcement learning beneath it, as pure functions in JAX.

Nothing is imported here on purpose; import the package you need, for example
`from rlhf_jax import losses` or `from rlhf_jax.algorithms import ppo`.
"""

__version__ = "0.1.0"
