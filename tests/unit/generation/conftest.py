"""A model small enough to enumerate everything that it can say."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EOS, PAD = 1, 0


class Toy:
    """A Markov chain of order two; the next token depends on the last two. Token 1 ends.

    The cache holds the tokens themselves, by column.
    """

    eos_id, pad_id = EOS, PAD

    def __init__(self, vocab_size=5, seed=0, scale=1.5):
        self.vocab_size = vocab_size
        self.table = scale * jax.random.normal(jax.random.key(seed), (vocab_size,) * 3)

    def prefill(self, params, tokens, positions, segment_ids, length):
        cache = jnp.pad(tokens, ((0, 0), (0, length - tokens.shape[1])))
        return params[tokens[:, -2], tokens[:, -1]], (cache, jnp.int32(tokens.shape[1]))

    def decode(self, params, cache, token, position):
        tokens, length = cache
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], length, axis=1)
        return params[tokens[:, length - 1], token], (tokens, length + 1)

    def extend(self, params, cache, tokens, positions, columns):
        held, length = cache
        rows, new = jnp.arange(len(tokens))[:, None], columns[:, None] + jnp.arange(tokens.shape[1])
        held = held.at[rows, new].set(tokens, mode="drop")
        return params[held[rows, new - 1], tokens], (held, length)

    def enumerate(self, prompt, steps, probs):
        """Every completion of at most `steps` tokens with its probability.

        Args:
          probs: `probs(logits [V], completion so far) -> [V]`.
        """
        table = np.asarray(self.table, np.float64)
        found = {}
        for tokens in itertools.product(range(self.vocab_size), repeat=steps):
            total, history = 1.0, [*prompt]
            for place, token in enumerate(tokens):
                total *= probs(table[history[-2], history[-1]], tokens[:place])[token]
                history.append(token)
                if token == EOS:
                    tokens = tokens[: place + 1]
                    break
            found[tokens] = total
        return {tokens: total for tokens, total in found.items() if total > 0}


@pytest.fixture(scope="session")
def toy():
    return Toy()


@pytest.fixture(scope="session")
def make_toy():
    return Toy


@pytest.fixture(scope="session")
def check_distribution():
    """Chi-square test at 1e-4 of sampled completions against their probabilities."""
    from scipy.stats import chi2

    def check(rollout, expected):
        tokens, mask = np.asarray(rollout.sequences.tokens), np.asarray(rollout.sequences.mask)
        counts = dict.fromkeys(expected, 0)
        for row, kept in zip(tokens, mask, strict=True):
            counts[tuple(row[kept].tolist())] += 1  # KeyError: what may not be said
        total = len(tokens)
        assert abs(sum(expected.values()) - 1) < 1e-6
        rare = [tokens for tokens, p in expected.items() if p * total < 5]
        bins = [(counts[t], p * total) for t, p in expected.items() if p * total >= 5]
        if rare:
            bins.append((sum(counts[t] for t in rare), max(sum(expected[t] for t in rare) * total, 1e-3)))
        statistic = sum((seen - p) ** 2 / p for seen, p in bins)
        assert statistic < chi2.ppf(1 - 1e-4, max(len(bins) - 1, 1)), (statistic, len(bins))

    return check
