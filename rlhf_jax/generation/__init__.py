"""Samplers and decode loops over the callables `prefill` and `decode`."""

from rlhf_jax.generation.automata import Automaton, json_automaton, regex_automaton, stop_automaton
from rlhf_jax.generation.loop import generate
from rlhf_jax.generation.sampling import Sampling, row_keys, sample_token

__all__ = [
    "Automaton",
    "Sampling",
    "generate",
    "json_automaton",
    "regex_automaton",
    "row_keys",
    "sample_token",
    "stop_automaton",
]
