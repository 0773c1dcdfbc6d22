"""Samplers, searches and decode loops over the callables `prefill`, `decode` and `extend`."""

from rlhf_jax.generation.automata import (
    Automaton,
    cut_at_stop,
    json_automaton,
    regex_automaton,
    stop_automaton,
)
from rlhf_jax.generation.beam import beam_search
from rlhf_jax.generation.continuous import generate_continuously
from rlhf_jax.generation.contrastive import contrastive_search
from rlhf_jax.generation.dola import contrast_layers, dola_fns
from rlhf_jax.generation.loop import generate, make_stream
from rlhf_jax.generation.processors import token_bias
from rlhf_jax.generation.sampling import Sampling, row_keys, sample_token
from rlhf_jax.generation.speculative import (
    Acceptance,
    Drafter,
    generate_speculatively,
    lookahead_drafter,
    model_drafter,
    prompt_drafter,
)

__all__ = [
    "Acceptance",
    "Automaton",
    "Drafter",
    "Sampling",
    "beam_search",
    "contrast_layers",
    "contrastive_search",
    "cut_at_stop",
    "dola_fns",
    "generate",
    "generate_continuously",
    "generate_speculatively",
    "json_automaton",
    "lookahead_drafter",
    "make_stream",
    "model_drafter",
    "prompt_drafter",
    "regex_automaton",
    "row_keys",
    "sample_token",
    "stop_automaton",
    "token_bias",
]
