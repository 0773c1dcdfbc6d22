"""Samplers, searches and decode loops over the callables `prefill`, `decode` and `extend`."""

from rlhf_jax.generation.automata import (
    Automaton,
    cut_at_stop,
    json_automaton,
    regex_automaton,
    stop_automaton,
)
from rlhf_jax.generation.beam import beam_search
from rlhf_jax.generation.continuous import continuous_batching_generate
from rlhf_jax.generation.contrastive import contrastive_search
from rlhf_jax.generation.dola import contrast_layers, dola_fns
from rlhf_jax.generation.loop import generate, make_stream
from rlhf_jax.generation.processors import token_bias
from rlhf_jax.generation.sampling import Sampling, row_keys, sample_token
from rlhf_jax.generation.speculative import (
    Acceptance,
    Proposer,
    draft_model_proposer,
    lookahead_proposer,
    prompt_lookup_proposer,
    speculative_decode,
)

__all__ = [
    "Acceptance",
    "Automaton",
    "Proposer",
    "Sampling",
    "beam_search",
    "continuous_batching_generate",
    "contrast_layers",
    "contrastive_search",
    "cut_at_stop",
    "dola_fns",
    "draft_model_proposer",
    "generate",
    "json_automaton",
    "lookahead_proposer",
    "make_stream",
    "prompt_lookup_proposer",
    "regex_automaton",
    "row_keys",
    "sample_token",
    "speculative_decode",
    "stop_automaton",
    "token_bias",
]
