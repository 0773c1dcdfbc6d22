"""Shared parts of all updates: the train state, gradient accumulation, and a guarded optimizer step."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.optimizers import OPTIMIZERS, Optimizer, is_matrix
from rlhf_jax.core.ranges import Count, PositiveOrInf, Range, Share, ShareBelow1, Weight, check_ranges
from rlhf_jax.core.rounding import Rounding, in_float32, narrow_leaves, rounded, widened
from rlhf_jax.core.trees import map_named, merge, pytree_dataclass, tree_add, tree_all_finite
from rlhf_jax.core.types import Array, Float, Int, Metrics, Params, Scalar

T = TypeVar("T")
Schedule = Literal["constant", "linear", "cosine", "wsd"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer behind gradient clipping; the learning rate itself is a `Hyper`, which sweeps can vary.

    Attributes:
      schedule: how the learning rate decays from 1 x to `end_lr_ratio` x its value; `wsd` stays at 1 x until
        the last `decay_fraction` of all steps, in which it decays linearly (warm-up, stable, decay; Hu et al.
        2024).
      optimizer: one of `OPTIMIZERS`.
      warmup_ratio: share of all steps in which the learning rate rises from 0.
      warmup_steps: the same in optimizer steps, in the place of `warmup_ratio`; None for that share. A run
        that is shorter warms up until its last step.
      total_steps: optimizer steps until the end of the decay; needed by every schedule but constant.
      end_lr_ratio: share of the learning rate left at the end.
      decay_fraction: share of the steps in which `wsd` decays; other schedules ignore it.
      clip_norm: bound of the gradients' global norm.
      weight_decay: decoupled, on matrices only: not on what is called `scale`, `bias`, `magnitude` or
        `singular`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      epsilon: added to the root of the second moment.
      rounding: how parameters of 16 bits take up an update (`core.rounding`); `nearest` suits float32.
    """

    schedule: Schedule = "constant"
    optimizer: Optimizer = "adamw"
    warmup_ratio: ShareBelow1 = 0.03
    warmup_steps: Count | None = None
    total_steps: Count = 0
    end_lr_ratio: Share = 0.0
    decay_fraction: Annotated[float, Range(0, 1, above=True)] = 0.2
    clip_norm: PositiveOrInf = 1.0
    weight_decay: Weight = 0.0
    b1: ShareBelow1 = 0.9
    b2: ShareBelow1 = 0.95
    epsilon: Weight = 1e-8
    rounding: Rounding = "nearest"

    @property
    def warmup(self) -> int:
        """Optimizer steps of warm-up; a schedule that decays keeps at least one step for it."""
        if self.warmup_steps is None:
            return round(self.warmup_ratio * self.total_steps)
        if self.schedule == "constant" or not self.total_steps:
            return self.warmup_steps
        return min(self.warmup_steps, self.total_steps - 1)

    @property
    def decay_start(self) -> int:
        """The optimizer step from which the learning rate decays."""
        if self.schedule != "wsd":
            return self.warmup
        decaying = max(round(self.decay_fraction * self.total_steps), 1)
        return max(self.total_steps - decaying, self.warmup)


def with_total_steps(config: OptimizerConfig, steps: int) -> OptimizerConfig:
    """The schedule stretched over a run of so many optimizer steps, unless its length was given."""
    return dataclasses.replace(config, total_steps=config.total_steps or steps)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optax chain of `config`; its updates are for a learning rate of 1, its moments at least float32.

    Raises:
      UserError: a number that no optimizer can have, or a decay without an end.
    """
    check_ranges(config, lambda path: f"Optimizer: {'.'.join(path)}")
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        OPTIMIZERS[config.optimizer](config.b1, config.b2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: map_named(is_matrix, params)),
        optax.scale_by_schedule(_share_of_learning_rate(config)),
    )
    return rounded(in_float32(chain), config.rounding)


def check_parameters_can_move(params: Params, config: OptimizerConfig) -> None:
    """Refuses to train parameters whose spacing would swallow the updates.

    Args:
      params: what is trained, without what is frozen.

    Raises:
      UserError: some have 16 bits or fewer, and sums are rounded to the nearest.
    """
    narrow = narrow_leaves(params)
    if not narrow or config.rounding != "nearest":
        return
    name, leaf = next(iter(narrow.items()))
    raise UserError(
        f"Optimizer: {len(narrow)} of {len(jax.tree.leaves(params))} trained parameters ({name}, ...) are "
        f"{leaf.dtype}, which rounds updates away, so that training would not move them: load the model with "
        "param_dtype='float32', or choose rounding='kahan' or rounding='stochastic'."
    )


def _share_of_learning_rate(config: OptimizerConfig) -> optax.Schedule:
    start = config.warmup
    warmup = optax.linear_schedule(0.0, 1.0, start) if start else None
    if config.schedule == "constant":
        stable = optax.constant_schedule(1.0)
        return optax.join_schedules([warmup, stable], [start]) if warmup else stable
    if not config.total_steps:
        raise UserError(
            f"Optimizer: schedule={config.schedule} needs total_steps: set it, or use schedule=constant."
        )
    decay_steps = config.total_steps - config.decay_start
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(1.0, decay_steps, config.end_lr_ratio)
    else:
        decay = optax.linear_schedule(1.0, config.end_lr_ratio, decay_steps)
    if config.schedule == "wsd":
        stable = optax.constant_schedule(1.0)
        decay = optax.join_schedules([stable, decay], [config.decay_start - start])
    return optax.join_schedules([warmup, decay], [start]) if warmup else decay


@pytree_dataclass
class TrainState:
    """Parameters and all that an optimizer step changes with them.

    Attributes:
      params: what is trained; a whole model, or its adapters, heads or some of its layers.
      opt_state: optax's state.
      steps: optimizer steps applied.
      skipped: steps left out because loss, gradients or updates were not finite.
      consecutive_skipped: of those, the latest unbroken run.
      frozen: the rest of the model, in nested dictionaries beside those of `params`; None where all is
        trained. No gradient, no moments, and no copy of it is ever made.
    """

    params: Params
    opt_state: Any
    steps: Int[Array, ""]
    skipped: Int[Array, ""]
    consecutive_skipped: Int[Array, ""]
    frozen: Params = None

    @property
    def all_params(self) -> Params:
        """The model: what is trained and what is frozen in one tree."""
        return self.params if self.frozen is None else merge(self.params, self.frozen)


def init_train_state(params: Params, tx: optax.GradientTransformation, frozen: Params = None) -> TrainState:
    """The train state at step 0."""
    return TrainState(params, tx.init(params), jnp.int32(0), jnp.int32(0), jnp.int32(0), frozen)


def without_frozen(state: Any) -> Any:
    """A state whose train states have lost their frozen parts: what a checkpoint holds."""
    return _map_train_states(lambda learner: dataclasses.replace(learner, frozen=None), state)


def with_frozen(state: Any, other: Any) -> Any:
    """A state whose train states have the frozen parts of those of `other`: undoes `without_frozen`."""
    return _map_train_states(lambda learner, of: dataclasses.replace(learner, frozen=of.frozen), state, other)


def frozen_parts(state: Any) -> list[Params]:
    """The frozen parts of a state's train states, in order."""
    found: list[Params] = []
    _map_train_states(lambda learner: found.append(learner.frozen) or learner, state)
    return found


def with_frozen_parts(state: Any, parts: Sequence[Params]) -> Any:
    """A state whose train states have these frozen parts: undoes `without_frozen` by `frozen_parts`."""
    rest = iter(parts)
    return _map_train_states(lambda learner: dataclasses.replace(learner, frozen=next(rest)), state)


def returning_trained(update: Callable[..., tuple[Any, Metrics]]) -> Callable[..., tuple[Any, Metrics]]:
    """`update(state, ...)` as a function of (state without its frozen parts, these parts, ...) that returns
    the state without them: what is frozen stays where it is, and is not copied.
    """

    def run(trained: Any, frozen: Sequence[Params], *rest: Any) -> tuple[Any, Metrics]:
        new, metrics = update(with_frozen_parts(trained, frozen), *rest)
        return without_frozen(new), metrics

    return run


def _map_train_states(function: Callable[..., TrainState], *states: Any) -> Any:
    def is_train_state(node: Any) -> bool:
        return isinstance(node, TrainState)

    def change(*nodes: Any) -> Any:
        return function(*nodes) if is_train_state(nodes[0]) else nodes[0]

    return jax.tree.map(change, *states, is_leaf=is_train_state)


def apply_gradients(
    learner: TrainState,
    gradients: Params,
    tx: optax.GradientTransformation,
    *,
    learning_rate: Scalar,
    loss: Float[Array, ""],
) -> tuple[TrainState, Metrics]:
    """One optimizer step; left out, and counted, when the loss, a gradient or their norm is not finite.

    `tx` gives updates for a learning rate of 1, and is told the learning rate where it takes extra arguments.
    The choice is a `where` over whole trees, so not one NaN reaches parameters or moments.

    Whole gradients can still give an update that is not finite, where the learning rate is absurd or an
    epsilon of 0 divides 0. Then each parameter and moment that it would spoil stays, and the step counts as
    skipped. To undo the others as well, a second copy of all of them would have to be held in every step.
    """
    norm = optax.global_norm(widened(gradients))
    whole = tree_all_finite((gradients, norm, loss))
    safe = jax.tree.map(lambda g: jnp.where(whole, g, 0).astype(g.dtype), gradients)
    update = optax.with_extra_args_support(tx).update
    updates, opt_state = update(safe, learner.opt_state, learner.params, learning_rate=learning_rate)
    updates = jax.tree.map(lambda u: (-learning_rate * u).astype(u.dtype), updates)
    params = optax.apply_updates(learner.params, updates)
    finite = whole & tree_all_finite((params, opt_state))
    skip = jnp.where(finite, 0, 1)

    def keep(new: Array, old: Array) -> Array:
        if new is old:
            return old
        is_float = jnp.issubdtype(new.dtype, jnp.inexact)
        return jnp.where(whole & jnp.isfinite(new) if is_float else whole, new, old)

    new = TrainState(
        params=jax.tree.map(keep, params, learner.params),
        opt_state=jax.tree.map(keep, opt_state, learner.opt_state),
        steps=learner.steps + 1 - skip,
        skipped=learner.skipped + skip,
        consecutive_skipped=jnp.where(finite, 0, learner.consecutive_skipped + 1),
        frozen=learner.frozen,
    )
    metrics = {
        "gradient_norm": norm,
        "skipped": new.skipped,
        "consecutive_skipped": new.consecutive_skipped,
    }
    return new, metrics


LossFn = Callable[[Params, Any], tuple[Float[Array, ""], Any]]


def accumulate_gradients(
    loss_fn: LossFn, learner: TrainState, batch: Any, *, micro_batches: int = 1
) -> tuple[Params, Float[Array, ""], Any]:
    """Gradients, loss and metrics of a batch, computed `1 / micro_batches` of its rows at a time.

    Only `learner.params` are differentiated; the loss sees the whole model.
    `loss_fn(all_params, part)` must divide by the denominator of the *whole* batch; then parts sum to exactly
    what the whole would give, metrics included, which may be any tree of sums. Sums of parts are held in at
    least float32.

    Args:
      batch: a pytree whose leaves have a first axis that `micro_batches` divides.

    Raises:
      UserError: `micro_batches` does not divide the rows.
    """
    params = learner.params

    def loss_of_trained(params: Params, part: Any) -> tuple[Float[Array, ""], Any]:
        return loss_fn(dataclasses.replace(learner, params=params).all_params, part)

    value_and_grad = jax.value_and_grad(loss_of_trained, has_aux=True)
    (loss, metrics), gradients = sum_over_parts(
        lambda part: value_and_grad(params, part), batch, micro_batches=micro_batches
    )
    return gradients, loss, metrics


def sum_over_parts(function: Callable[[Any], T], batch: Any, *, micro_batches: int) -> T:
    """The sum of `function(part)` over `micro_batches` parts of a batch's rows, one after the other.

    Args:
      batch: a pytree whose leaves have a first axis that `micro_batches` divides.

    Raises:
      UserError: `micro_batches` does not divide the rows.
    """
    if micro_batches == 1:
        return function(batch)
    left_over = [leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.shape[0] % micro_batches]
    if left_over:
        raise UserError(
            f"micro_batches={micro_batches} does not divide the {left_over[0]} rows of a batch: change one"
        )
    # Every `micro_batches`-th row: a part then has its share of the rows of every device.
    parts = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)

    def step(total: Any, part: Any) -> tuple[Any, None]:
        return tree_add(total, function(part)), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, _sum_dtype(s.dtype)), shapes)
    total, _ = jax.lax.scan(step, zeros, parts)
    return jax.tree.map(lambda x, s: x.astype(s.dtype), total, shapes)


def _sum_dtype(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else dtype
