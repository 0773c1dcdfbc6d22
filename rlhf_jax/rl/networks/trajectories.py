"""A transformer over trajectories: returns-to-go, observations and actions as tokens of one sequence."""

import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.types import Array, Bool, Float, Int
from rlhf_jax.models.config import Attention, Block, FeedForward, LayerNorm, ModelConfig
from rlhf_jax.models.decoder import Decoder
from rlhf_jax.rl.networks.distributions import Distribution


def _decoder_config(*, width: int, num_layers: int, num_heads: int) -> ModelConfig:
    """A decoder of the GPT kind whose tokens are given as vectors, their times among them."""
    attention = Attention(num_heads, num_heads, width // num_heads, position=None)
    block = Block(attention, FeedForward(4 * width), norm=LayerNorm())
    return ModelConfig(
        vocab_size=1,  # never looked up
        width=width,
        num_layers=num_layers,
        pattern=(block,),
        final_norm=LayerNorm(),
        embedding_norm=LayerNorm(),
    )


class TrajectoryTransformer(nn.Module):
    """The distribution of each action, given what was before it and the return that is to come.

    Tokens are R_1, s_1, a_1, R_2, s_2, a_2, ...; an action is told at the token of its state. The three
    tokens of a step share an embedding of its number in the episode (Chen et al. 2021, section 3).

    Attributes:
      torso: observations -> features.
      head: features -> distribution of actions.
      max_steps: of an episode.
      width: of the transformer.
      num_layers: of the transformer.
      num_heads: of its attention; they divide the width.
      num_actions: A; None where actions are vectors.
    """

    torso: nn.Module
    head: nn.Module
    max_steps: int
    width: int
    num_layers: int
    num_heads: int
    num_actions: int | None = None

    @nn.compact
    def __call__(
        self,
        returns: Float[Array, "N K"],
        obs: Array,
        action: Array,
        step: Int[Array, "N K"],
        mask: Bool[Array, "N K"],
    ) -> Distribution:
        """Distributions of the actions, [N, K]; those of masked steps are anything.

        Args:
          returns: to come from each step on, in units near 1.
          step: number of each in its episode.
          mask: steps that are there; the others lie before the first.
        """
        rows, count = mask.shape
        width = self.width
        time = nn.Embed(self.max_steps, width, name="time")(step)
        if self.num_actions is None:
            actions = nn.Dense(width, name="action")(action)
        else:
            actions = nn.Embed(self.num_actions, width, name="action")(action)
        given = nn.Dense(width, name="return")(returns[..., None])
        states = nn.Dense(width, name="obs")(self.torso(obs))
        tokens = jnp.stack([given + time, states + time, actions + time], axis=2)
        tokens = tokens.reshape(rows, 3 * count, width)
        segments = jnp.repeat(mask.astype(jnp.int32), 3, axis=1)
        places = jnp.broadcast_to(jnp.arange(3 * count), segments.shape)
        config = _decoder_config(width=width, num_layers=self.num_layers, num_heads=self.num_heads)
        decoder = Decoder(config, name="decoder")
        hidden, _ = decoder(jnp.zeros_like(segments), places, segments, soft=tokens)
        return self.head(hidden.reshape(rows, count, 3, width)[:, :, 1])
