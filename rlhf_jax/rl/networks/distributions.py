"""Distributions of actions: categorical, diagonal Gaussian, and Gaussian squashed into a box.

Each is a pytree whose leading axes are those of a batch. Log-probabilities, entropies and divergences are
in nats and summed over the dimensions of one action.
"""

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Int, PRNGKeyArray, Scalar

HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)


@pytree_dataclass
class Categorical:
    """Numbers 0 ... A - 1 with probabilities softmax(logits)."""

    logits: Float[Array, "... A"]

    def sample(self, key: PRNGKeyArray) -> Int[Array, "..."]:
        """One action for each entry of the batch."""
        return jax.random.categorical(key, self.logits)

    def mode(self) -> Int[Array, "..."]:
        """The likeliest action."""
        return jnp.argmax(self.logits, axis=-1)

    def logp(self, action: Int[Array, "..."]) -> Float[Array, "..."]:
        """Log-probability of `action`."""
        # A comparison rather than a gather: its gradient is no scatter, which CPUs and TPUs are slow at.
        chosen = jnp.arange(self.logits.shape[-1]) == action[..., None]
        return jnp.sum(jnp.where(chosen, jax.nn.log_softmax(self.logits), 0), axis=-1)

    def entropy(self) -> Float[Array, "..."]:
        """-sum_a p_a log p_a."""
        logp = jax.nn.log_softmax(self.logits)
        return -jnp.sum(jnp.exp(logp) * logp, axis=-1)

    def kl(self, other: "Categorical") -> Float[Array, "..."]:
        """KL(self || other)."""
        logp = jax.nn.log_softmax(self.logits)
        return jnp.sum(jnp.exp(logp) * (logp - jax.nn.log_softmax(other.logits)), axis=-1)


def gumbel_softmax(
    logits: Float[Array, "... A"], key: PRNGKeyArray, *, temperature: Scalar
) -> Float[Array, "... A"]:
    """Straight-through Gumbel-softmax (Jang et al. 2017, eq. 2, section 2.2): a sample of softmax(logits).

        one_hot(argmax_a(logits_a + g_a)), with the gradient of softmax((logits + g) / temperature)

    That gradient is biased: less, and noisier, the lower the temperature.
    """
    noisy = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    soft = jax.nn.softmax(noisy / temperature)
    hard = jax.nn.one_hot(jnp.argmax(noisy, axis=-1), logits.shape[-1], dtype=logits.dtype)
    return hard + soft - jax.lax.stop_gradient(soft)


@pytree_dataclass
class DiagonalGaussian:
    """Independent normals, unbounded; the environment clips what leaves its box."""

    mean: Float[Array, "... A"]
    log_std: Float[Array, "... A"]

    def sample(self, key: PRNGKeyArray) -> Float[Array, "... A"]:
        """One action for each entry of the batch, with gradient to mean and log_std."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(self.log_std) * noise

    def mode(self) -> Float[Array, "... A"]:
        """Mode of the Gaussian: its mean."""
        return self.mean

    def logp(self, action: Float[Array, "... A"]) -> Float[Array, "..."]:
        """Log-density of `action`."""
        scaled = (action - self.mean) * jnp.exp(-self.log_std)
        return -jnp.sum(0.5 * jnp.square(scaled) + self.log_std + HALF_LOG_2_PI, axis=-1)

    def entropy(self) -> Float[Array, "..."]:
        """Differential entropy: sum_i log std_i + log(2 pi e) / 2."""
        return jnp.sum(self.log_std + HALF_LOG_2_PI + 0.5, axis=-1)

    def kl(self, other: "DiagonalGaussian") -> Float[Array, "..."]:
        """KL(self || other)."""
        log_ratio = self.log_std - other.log_std
        distance = (self.mean - other.mean) * jnp.exp(-other.log_std)
        return 0.5 * jnp.sum(jnp.exp(2 * log_ratio) + jnp.square(distance) - 1 - 2 * log_ratio, axis=-1)


@pytree_dataclass
class TanhGaussian:
    """centre + half_range tanh(x) for x of a diagonal Gaussian (SAC, Haarnoja et al. 2018, appendix C).

    Attributes:
      low: of the box.
      high: of the box.
    """

    mean: Float[Array, "... A"]
    log_std: Float[Array, "... A"]
    low: Float[Array, " A"]
    high: Float[Array, " A"]

    def sample(self, key: PRNGKeyArray) -> Float[Array, "... A"]:
        """One action for each entry of the batch, with gradient to mean and log_std."""
        return self.sample_and_logp(key)[0]

    def sample_and_logp(self, key: PRNGKeyArray) -> tuple[Float[Array, "... A"], Float[Array, "..."]]:
        """An action and its log-density, exact also where tanh has saturated."""
        gaussian = DiagonalGaussian(self.mean, self.log_std)
        raw = gaussian.sample(key)
        return self._squash(raw), gaussian.logp(raw) - self._log_slope(raw)

    def mode(self) -> Float[Array, "... A"]:
        """Squashed mean, taken for the mode."""
        return self._squash(self.mean)

    def logp(self, action: Float[Array, "... A"]) -> Float[Array, "..."]:
        """Log-density of `action`; actions at the box's faces are taken to just inside it."""
        unit = (action - (self.high + self.low) / 2) / ((self.high - self.low) / 2)
        edge = 1 - jnp.finfo(unit.dtype).eps
        raw = jnp.arctanh(jnp.clip(unit, -edge, edge))
        return DiagonalGaussian(self.mean, self.log_std).logp(raw) - self._log_slope(raw)

    def _squash(self, raw: Float[Array, "... A"]) -> Float[Array, "... A"]:
        return (self.high + self.low) / 2 + (self.high - self.low) / 2 * jnp.tanh(raw)

    def _log_slope(self, raw: Float[Array, "... A"]) -> Float[Array, "..."]:
        # log(1 - tanh(x)^2) = 2 (log 2 - x - softplus(-2 x)), which does not cancel for large |x|.
        slope = 2 * (math.log(2) - raw - jax.nn.softplus(-2 * raw))
        return jnp.sum(slope + jnp.log((self.high - self.low) / 2), axis=-1)


Distribution: TypeAlias = Categorical | DiagonalGaussian
