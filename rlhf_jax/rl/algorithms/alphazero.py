"""AlphaZero (Silver et al. 2018) on two-player games, with the Gumbel search of mctx (Danihelka et al. 2022).

A network gives priors and a value to the search, self-play follows the search, and the network learns what
the search found and how the game ended. Values are of the player to move, so that one ply later they have
the other sign.

    train = alphazero.make_train(alphazero.Config(), TIC_TAC_TOE)
    state, history = jax.jit(train)(key, alphazero.Hyper())
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.importing import optional
from rlhf_jax.core.masks import clean, masked_mean
from rlhf_jax.core.minibatches import scan_minibatches
from rlhf_jax.core.train_state import (
    OptimizerConfig,
    TrainState,
    accumulate_gradients,
    apply_gradients,
    init_train_state,
    make_optimizer,
)
from rlhf_jax.core.trees import pytree_dataclass, tree_where
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.rl.games.interface import Game, Position
from rlhf_jax.rl.games.matches import ChooseFn, random_openings
from rlhf_jax.rl.loops.runs import Train
from rlhf_jax.rl.networks.networks import MLP, Activation, linear

ApplyFn = Callable[[Params, Float[Array, "B *S"]], tuple[Float[Array, "B A"], Float[Array, "B"]]]
"""(params, observations) -> (policy logits, values in [-1, 1] of the player to move)."""


def _mctx() -> Any:
    # Loaded by those who search; its dataclasses have constructors that type checkers do not see.
    return optional("mctx", extra="search")


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices; the defaults are those for tic-tac-toe.

    Attributes:
      iterations: of a whole run; each is self-play and then learning from it.
      num_games: played side by side.
      plies: moves of each game an iteration; a game that ends is followed by a new one.
      opening: a new game begins after 0 to this many random moves. Without them self-play soon tells the same
        few games again and again, and forgets how to answer all others.
      num_simulations: of the search, for each move.
      max_num_considered_actions: actions that the root of the search looks at, at most.
      widths: of the network's layers.
      num_epochs: over the moves of an iteration.
      num_minibatches: of an epoch; divide `num_games` x `plies`.
      optimizer: Adam; the schedule is stretched over the run.
    """

    iterations: int = 60
    num_games: int = 128
    plies: int = 9
    opening: int = 4
    num_simulations: int = 32
    max_num_considered_actions: int = 16
    widths: tuple[int, ...] = (128, 128)
    num_epochs: int = 2
    num_minibatches: int = 4
    optimizer: OptimizerConfig = OptimizerConfig(
        schedule="cosine", warmup_steps=0, b2=0.999, weight_decay=1e-4
    )

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of a whole run."""
        return self.iterations * self.num_epochs * self.num_minibatches


@pytree_dataclass
class Hyper:
    """Hyperparameters of AlphaZero that a sweep may vary (array leaves).

    Attributes:
      value_coef: weight of the value's squared error beside the policy's cross-entropy.
    """

    learning_rate: Scalar = 2e-3
    value_coef: Scalar = 1.0


@pytree_dataclass
class State:
    """All that a resume needs; the games go on from iteration to iteration."""

    learner: TrainState
    positions: Position
    key: PRNGKeyArray


@pytree_dataclass
class Batch:
    """Moves of self-play.

    Attributes:
      obs: what the mover saw.
      legal: what it might do.
      policy: what the search made of it; sums to 1.
      outcome: 1, 0 or -1 as the game ended for the mover.
      ended: whether it has; else there is no outcome, and the value learns nothing.
    """

    obs: Float[Array, "N *S"]
    legal: Bool[Array, "N A"]
    policy: Float[Array, "N A"]
    outcome: Float[Array, "N"]
    ended: Bool[Array, "N"]


# Network and search --------------------------------------------------------------------------------


class PolicyValue(nn.Module):
    """Dense layers on the flat board, a head for the policy and one for the value.

    Attributes:
      widths: of the layers.
      num_actions: of the game.
      activation: after each layer.
    """

    widths: tuple[int, ...]
    num_actions: int
    activation: Activation = nn.relu

    @nn.compact
    def __call__(self, obs: Float[Array, "B *S"]) -> tuple[Float[Array, "B A"], Float[Array, "B"]]:
        """Policy logits and values."""
        features = MLP(self.widths, self.activation)(obs)
        logits = linear(self.num_actions, 0.01, "policy")(features)
        return logits, jnp.tanh(linear(1, 0.01, "value")(features)[:, 0])


def make_network(config: Config, game: Game) -> tuple[Callable[[PRNGKeyArray], Params], ApplyFn]:
    """(init, apply) of the network of `config`."""
    module = PolicyValue(config.widths, game.num_actions)
    blank = jnp.zeros((1, *game.obs_shape))
    return lambda key: module.init(key, blank), module.apply  # pyright: ignore[reportReturnType]


def search(
    game: Game,
    apply: ApplyFn,
    params: Params,
    positions: Position,
    key: PRNGKeyArray,
    *,
    num_simulations: int,
    max_num_considered_actions: int = 16,
    gumbel_scale: Scalar = 1.0,
) -> Any:
    """Gumbel search from positions [B], with the true rules as the model; gives mctx's `PolicyOutput`.

    Args:
      gumbel_scale: 0 plays without randomness, 1 explores as self-play must.
    """

    def judge(positions: Position) -> tuple[Float[Array, "B A"], Float[Array, "B"]]:
        logits, values = apply(params, jax.vmap(game.observe)(positions))
        legal = jax.vmap(game.legal)(positions)
        return jnp.where(legal, logits, jnp.finfo(logits.dtype).min), values

    def expand(_: Any, __: PRNGKeyArray, action: Int[Array, "B"], before: Position):
        after = jax.vmap(game.play)(before, action)
        logits, values = judge(after)
        # To the mover a win is 1. Nothing follows a game that is over, and it is won only once.
        reward = jnp.where(before.terminated, 0, after.winner * before.player).astype(values.dtype)
        discount = jnp.where(after.terminated, 0, -1).astype(values.dtype)
        expanded = _mctx().RecurrentFnOutput(
            reward=reward,
            discount=discount,
            prior_logits=logits,
            value=values,
        )
        return expanded, after

    logits, values = judge(positions)
    root = _mctx().RootFnOutput(prior_logits=logits, value=values, embedding=positions)
    return _mctx().gumbel_muzero_policy(
        params,
        key,
        root,
        expand,
        num_simulations=num_simulations,
        invalid_actions=~jax.vmap(game.legal)(positions),
        max_depth=game.length,
        max_num_considered_actions=min(max_num_considered_actions, game.num_actions),
        gumbel_scale=gumbel_scale,
    )


def make_player(
    game: Game, apply: ApplyFn, params: Params, *, num_simulations: int, max_num_considered_actions: int = 16
) -> ChooseFn:
    """A player without randomness; with no simulations it takes the network's likeliest legal action."""

    def choose(positions: Position, key: PRNGKeyArray) -> Int[Array, "B"]:
        if not num_simulations:
            logits, _ = apply(params, jax.vmap(game.observe)(positions))
            return jnp.argmax(jnp.where(jax.vmap(game.legal)(positions), logits, -jnp.inf), axis=-1)
        options = {
            "num_simulations": num_simulations,
            "max_num_considered_actions": max_num_considered_actions,
            "gumbel_scale": 0.0,
        }
        return search(game, apply, params, positions, key, **options).action

    return choose


# Self-play and learning ----------------------------------------------------------------------------


def self_play(
    config: Config, game: Game, apply: ApplyFn, params: Params, positions: Position, key: PRNGKeyArray
) -> tuple[Position, Batch]:
    """`config.plies` moves of every game; a new game follows one that has ended."""

    def step(positions: Position, key: PRNGKeyArray):
        search_key, new_key = jax.random.split(key)
        found = search(
            game,
            apply,
            params,
            positions,
            search_key,
            num_simulations=config.num_simulations,
            max_num_considered_actions=config.max_num_considered_actions,
        )
        after = jax.vmap(game.play)(positions, found.action)
        move = (
            jax.vmap(game.observe)(positions),
            jax.vmap(game.legal)(positions),
            found.action_weights,
            (after.winner * positions.player).astype(jnp.float32),
            after.terminated,
        )
        return jax.vmap(tree_where)(after.terminated, new_games(config, game, new_key), after), move

    positions, (obs, legal, policy, reward, over) = jax.lax.scan(
        step, positions, jax.random.split(key, config.plies)
    )
    outcome, ended = outcomes(reward, over)
    moves = (obs, legal, policy, outcome, ended)
    return positions, Batch(*(x.reshape(-1, *x.shape[2:]) for x in moves))


def new_games(config: Config, game: Game, key: PRNGKeyArray) -> Position:
    """As many as are played side by side, each after its random opening."""
    plies_key, move_key = jax.random.split(key)
    plies = jax.random.randint(plies_key, (config.num_games,), 0, config.opening + 1)
    return random_openings(game, move_key, plies, most=config.opening)


def outcomes(
    reward: Float[Array, "T B"], over: Bool[Array, "T B"]
) -> tuple[Float[Array, "T B"], Bool[Array, "T B"]]:
    """Game outcomes for the mover of each ply, and a mask of games that ended; 0 where they did not.

    Args:
      reward: 1 where the mover's move won.
      over: where the game ended with that move.
    """

    def step(later: tuple[Array, Array], now: tuple[Array, Array]):
        reward, over = now
        outcome = jnp.where(over, reward, -later[0])
        ended = over | later[1]
        return (outcome, ended), (outcome, ended)

    nothing = (jnp.zeros(reward.shape[1:], reward.dtype), jnp.zeros(over.shape[1:], bool))
    outcome, ended = jax.lax.scan(step, nothing, (reward, over), reverse=True)[1]
    return jnp.where(ended, outcome, 0), ended


def alphazero_loss(
    logits: Float[Array, "N A"], values: Float[Array, "N"], batch: Batch, *, value_coef: Scalar
) -> tuple[Float[Array, ""], Metrics]:
    """(z - v)^2 - pi . log p (Silver et al. 2017, eq. 1), the value's term only where the game has ended."""
    logp = jax.nn.log_softmax(jnp.where(batch.legal, logits, jnp.finfo(logits.dtype).min))
    policy_loss = -jnp.mean(jnp.sum(jnp.where(batch.legal, batch.policy * logp, 0), axis=-1))
    value_loss = masked_mean((values - clean(batch.outcome, batch.ended)) ** 2, batch.ended)
    loss = policy_loss + value_coef * value_loss
    return loss, {"loss": loss, "policy_loss": policy_loss, "value_loss": value_loss}


def init(
    config: Config, game: Game, params: Params, tx: optax.GradientTransformation, key: PRNGKeyArray
) -> State:
    """The state at iteration 0."""
    key, game_key = jax.random.split(key)
    return State(init_train_state(params, tx), new_games(config, game, game_key), key)


def make_update(
    config: Config, apply: ApplyFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch)`: epochs of shuffled mini-batches over the moves."""

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        def loss_fn(params: Params, part: Batch):
            return alphazero_loss(*apply(params, part.obs), part, value_coef=hyper.value_coef)

        def step(learner: TrainState, part: Batch):
            gradients, loss, metrics = accumulate_gradients(loss_fn, learner, part)
            learner, guard = apply_gradients(
                learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
            )
            return learner, {**metrics, **guard}, jnp.bool_(False)

        key, order_key = jax.random.split(state.key)
        learner, metrics = scan_minibatches(
            step,
            state.learner,
            batch,
            order_key,
            epochs=config.num_epochs,
            minibatches=config.num_minibatches,
        )
        return dataclasses.replace(state, learner=learner, key=key), metrics

    return update


InitFn = Callable[[PRNGKeyArray], State]
PlayFn = Callable[[State], tuple[State, Batch]]
LearnFn = Callable[[State, Hyper, Batch], tuple[State, Metrics]]


def make_iteration(config: Config, game: Game) -> tuple[InitFn, PlayFn, LearnFn]:
    """(init_state, play, learn): an iteration is `play(state)`, then `learn(state, hyper, batch)`."""
    init_params, apply = make_network(config, game)
    optimizer = dataclasses.replace(config.optimizer, total_steps=config.optimizer_steps)
    tx = make_optimizer(optimizer)
    update = make_update(config, apply, tx)

    def init_state(key: PRNGKeyArray) -> State:
        params_key, state_key = jax.random.split(key)
        return init(config, game, init_params(params_key), tx, state_key)

    def play(state: State) -> tuple[State, Batch]:
        key, play_key = jax.random.split(state.key)
        params = state.learner.params
        positions, batch = self_play(config, game, apply, params, state.positions, play_key)
        return dataclasses.replace(state, positions=positions, key=key), batch

    def learn(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        state, metrics = update(state, hyper, batch)
        drawn = jnp.sum(batch.ended & (batch.outcome == 0)) / jnp.maximum(jnp.sum(batch.ended), 1)
        entropy = -jnp.mean(jnp.sum(jax.scipy.special.xlogy(batch.policy, batch.policy), axis=-1))
        return state, {**metrics, "drawn_share": drawn, "search_entropy": entropy}

    return init_state, play, learn


def make_train(config: Config, game: Game) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    init_state, play, learn = make_iteration(config, game)

    def train(key: PRNGKeyArray, hyper: Hyper) -> tuple[State, Metrics]:
        def iterate(state: State, _: None) -> tuple[State, Metrics]:
            state, batch = play(state)
            return learn(state, hyper, batch)

        return jax.lax.scan(iterate, init_state(key), None, length=config.iterations)

    return train
