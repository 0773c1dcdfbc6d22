"""A tiny policy whose samples are words of letters that end: what most random decoders of bytes never say."""

import string

import jax
import numpy as np

from rlhf_jax import models
from rlhf_jax.data.tokenizers import byte_tokenizer


def speaks_in_letters():
    """A tiny decoder of bytes whose states have a part in common, to which letters and the end are near."""
    tokenizer = byte_tokenizer()
    shape = {"width": 32, "num_layers": 1, "num_heads": 2, "tie_word_embeddings": False}
    config = models.dense_config(vocab_size=tokenizer.vocab_size, **shape)
    params = models.init_params(config, jax.random.key(0))
    said = [tokenizer.eos_id, *(tokenizer.encode(letter)[0] for letter in string.ascii_lowercase)]
    near = np.full((config.vocab_size, 1), -1.0, np.float32)
    near[said] = 1.0
    params = {**params, "embedding": params["embedding"] + 1.0, "unembedding": params["unembedding"] + near}
    return models.make_policy(config, params, tokenizer)
