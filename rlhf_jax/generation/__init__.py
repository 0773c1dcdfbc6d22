"""Samplers and decode loops over the callables `prefill` and `decode`."""

from rlhf_jax.generation.loop import generate
from rlhf_jax.generation.sampling import Sampling, sample_token

__all__ = ["Sampling", "generate", "sample_token"]
