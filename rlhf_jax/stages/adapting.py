"""Trainable part of a model: all of it, some of it, or an adapter beside a frozen base."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import jax
import optax
import tyro

from rlhf_jax import distributed
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Length, Positive, Width
from rlhf_jax.core.train_state import (
    OptimizerConfig,
    TrainState,
    check_parameters_can_move,
    make_optimizer,
    with_total_steps,
)
from rlhf_jax.core.trees import merge, named_leaves, partition
from rlhf_jax.core.types import Params, PRNGKeyArray
from rlhf_jax.models import Policy, adapters, pruning, reference_params
from rlhf_jax.stages import option_groups, starting
from rlhf_jax.training.run_folder import Adaptation

State = TypeVar("State")
Kind = Literal[
    "none", "lora", "rslora", "dora", "pissa", "adalora", "prefix", "prompt", "bottleneck", "partial"
]
LOW_RANK = ("rank", "alpha", "targets", "quantize")
OPTIONS_OF = {
    "none": ("preserve_sparsity",),
    "lora": LOW_RANK,
    "rslora": LOW_RANK,
    "dora": LOW_RANK,
    "pissa": LOW_RANK,
    "adalora": LOW_RANK,
    "prefix": ("length", "quantize"),
    "prompt": ("length", "quantize"),
    "bottleneck": ("width", "targets", "quantize"),
    "partial": ("train", "preserve_sparsity"),
}


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
    """Adapter options; the checkpoints of an adapter hold the adapter alone, and point to --model.

    Attributes:
      kind: none trains everything, partial some layers; lora, rslora, dora, pissa, adalora, prefix, prompt
        and bottleneck train an adapter beside a frozen base.
      rank: of lora, rslora, dora, pissa, and of adalora at the end (it starts from half as much again).
      alpha: the low-rank product is multiplied with alpha / rank (rslora: alpha / its root).
      targets: which linear layers, a regular expression for their whole path (layer_0/attention/query);
        empty for all (bottleneck: those that write to the residual stream).
      train: which parameters partial trains, a regular expression for their whole name
        (layer_1/.*|final_norm.*).
      length: of a prefix or prompt, in tokens.
      width: of a bottleneck.
      quantize: keep the frozen kernels in few bits (QLoRA is lora with nf4); gguf keeps them as the GGUF file
        in --model has them, to the bit (Q8_0, Q4 to Q6, also of K).
      preserve_sparsity: weights of linear layers that are zero in --model stay zero (fine-tuning of a pruned
        policy).
    """

    MAKER: ClassVar[str] = "rlhf_jax.lora"

    kind: Annotated[Kind, tyro.conf.arg(metavar="KIND")] = "none"
    rank: Width = 8
    alpha: Positive = 16.0
    targets: str = ""
    train: str = ""
    length: Length = 16
    width: Width = 16
    quantize: Literal["none", "int8", "int4", "nf4", "fp8", "gguf"] = "none"
    preserve_sparsity: bool = False

    @property
    def is_adapter(self) -> bool:
        """True if an adapter is trained, and not the model or a part of it."""
        return self.kind not in ("none", "partial")

    def adapter(self, steps: int) -> adapters.Adapter | None:
        """Adapter description for a run of so many optimizer steps; None where everything is trained.

        Raises:
          UserError: an option that means nothing to the kind, or that it cannot do without.
        """
        self._check()
        low_rank: dict[str, Any] = {"rank": self.rank, "alpha": self.alpha, "targets": self.targets or ".*"}
        match self.kind:
            case "none":
                return None
            case "lora":
                return adapters.LoRA(**low_rank)
            case "rslora":
                return adapters.LoRA(**low_rank, rank_stabilized=True)
            case "dora":
                return adapters.DoRA(**low_rank)
            case "pissa":
                return adapters.PiSSA(**low_rank)
            case "adalora":
                return adapters.AdaLoRA(
                    **{**low_rank, "rank": self.rank + -(-self.rank // 2)},
                    target_rank=self.rank,
                    total_steps=steps,
                    warmup_steps=steps // 10,
                    final_steps=3 * steps // 10,
                )
            case "prefix":
                return adapters.PrefixTuning(self.length)
            case "prompt":
                return adapters.PromptTuning(self.length)
            case "bottleneck":
                return adapters.Bottleneck(self.width, self.targets or adapters.Bottleneck.targets)
            case "partial":
                return adapters.Partial(self.train)

    def _check(self) -> None:
        if self.kind == "partial" and not self.train:
            raise UserError("--adapter.kind partial trains nothing yet: say what with --adapter.train")
        for field in dataclasses.fields(self):
            given = getattr(self, field.name) != field.default
            if field.name != "kind" and given and field.name not in OPTIONS_OF[self.kind]:
                fitting = ", ".join(kind for kind, names in OPTIONS_OF.items() if field.name in names)
                raise UserError(
                    f"--adapter.{field.name} means nothing to --adapter.kind {self.kind}: "
                    f"leave it out, or choose one of {fitting}"
                )


@dataclasses.dataclass(frozen=True)
class TrainableSplit:
    """A decoder as a script trains it.

    Attributes:
      trained: copies, or leaves of a fresh adapter: they may be donated.
      frozen: the rest, shared with the model that was given, which must not be used once this is donated;
        None where everything is trained.
      original: what the frozen base lacks of the decoder as it was.
      tx: the optimizer, with the rank budget of an adapter that has one, and under which zeros may stay.
      adaptation: how the run describes itself; None where everything is trained.
    """

    trained: Params
    frozen: Params
    original: Params
    tx: optax.GradientTransformation
    adaptation: Adaptation | None = None

    @property
    def base(self) -> Params:
        """Frozen base that adapted models share; empty where everything is trained."""
        return adapters.without_adapter(self.frozen or {})

    @property
    def unshared_params(self) -> Params:
        """The decoder without what it shares."""
        held = partition(self.frozen or {}, lambda name, leaf: adapters.is_adapter_leaf(name))[0]
        return merge(self.trained, held)

    def fresh_unshared_params(self, key: jax.Array) -> Params:
        """The same for a second decoder on the base: a fresh adapter, or the original of what is trained."""
        if self.original or self.adaptation is None:
            return starting.copied(self.original)
        adapted = adapters.init_adapter(self.adaptation.adapter, self.base, key)
        return partition(adapted, lambda name, leaf: adapters.is_adapter_leaf(name))[0]

    def trains(self, name: str, leaf: jax.Array) -> bool:
        """True if a leaf that is not the base's is trained, by its name: heads are."""
        is_frozen = adapters.is_adapter_leaf(name) and not adapters.is_trained(adapters.LoRA())(name, leaf)
        return not is_frozen

    def reference(self, learner: TrainState, original: Params = None) -> Params:
        """The decoder as it was, out of the base that its train state holds.

        Args:
          original: `self.original` where a jitted function got it as an argument, rather than as a constant.
        """
        base = adapters.without_adapter(learner.frozen or {})
        return reference_params({"base": base}, self.original if original is None else original)


def split_trainable(
    options: AdapterOptions,
    optimizer: OptimizerConfig,
    model: Policy,
    *,
    seed: int,
    steps: int,
    brought: bool = False,
) -> TrainableSplit:
    """Split of a model into what is trained and what is frozen.

    Args:
      steps: optimizer steps of the run.
      brought: the policy was given as an object, which need not come from a folder.

    Raises:
      UserError: an option is wrong, there is no base to adapt, or nothing would be trained.
    """
    adapter = options.adapter(steps)
    if [name for name in named_leaves(model.params) if adapters.is_adapter_leaf(name)]:
        raise UserError(
            "the policy in --model has a prefix, a prompt or bottlenecks, which cannot be merged into it, "
            "and nothing is trained on top of these: start from the run that it adapts"
        )
    tx = make_optimizer(with_total_steps(optimizer, steps))
    tx = pruning.preserve_sparsity(tx) if options.preserve_sparsity else tx
    if adapter is None:
        _check_moves(model.params, optimizer)
        return TrainableSplit(starting.copied(model.params), None, model.params, tx)
    check_base(options, exists=model.source is not None or brought)
    quantization = None if options.quantize == "none" else adapters.Quantization(options.quantize)
    adaptation = Adaptation(adapter, model.source, quantization)
    trained, frozen = adaptation.adapted(model.params, jax.random.key(seed))
    if not trained:
        some = ", ".join(list(named_leaves(model.params))[:3])
        raise UserError(
            f"--adapter.train {options.train!r} matches no parameter, so nothing would be trained: the "
            f"names are such as {some}"
        )
    _check_moves(trained, optimizer)
    original = trained if isinstance(adapter, adapters.Partial) else {}
    tx = adapters.with_rank_budget(adapter, tx) if isinstance(adapter, adapters.AdaLoRA) else tx
    return TrainableSplit(starting.copied(trained), frozen, original, tx, adaptation)


def check_base(options: AdapterOptions, *, exists: bool) -> None:
    """Raises: UserError where an adapter has no base that `exists` before the run."""
    if options.kind != "none" and not exists:
        raise UserError(
            f"--adapter.kind {options.kind} needs a model to adapt, and this one is new: give one by --model"
        )


def check_sparse(options: AdapterOptions, model: Policy) -> None:
    """Raises: UserError where zeros are to stay and the policy has none."""
    if options.preserve_sparsity and not pruning.kernel_sparsity(model.params)[""]:
        raise UserError(
            "--adapter.preserve-sparsity: the policy has no zero weights: prune it first (rlhf prune)"
        )


def split_shapes(split: Callable[[Policy], TrainableSplit], model: Policy) -> TrainableSplit:
    """`split(model)` of a model whose parameters are shapes, and shapes in the place of its arrays."""
    found: list[TrainableSplit] = []

    def trees(params: Params) -> tuple[Params, Params, Params]:
        found.append(split(dataclasses.replace(model, params=params)))
        return found[0].trained, found[0].frozen, found[0].original

    trained, frozen, original = jax.eval_shape(trees, model.params)
    return dataclasses.replace(found[0], trained=trained, frozen=frozen, original=original)


def shapes_from_split(
    function: Callable[..., Any], model: Policy, split: TrainableSplit, *trees: Params
) -> Any:
    """Shapes of `function(model, split, *trees)`, where all these hold shapes."""

    def of(params: Params, trained: Params, frozen: Params, original: Params, *trees: Params) -> Any:
        held = dataclasses.replace(split, trained=trained, frozen=frozen, original=original)
        return function(dataclasses.replace(model, params=params), held, *trees)

    return jax.eval_shape(of, model.params, split.trained, split.frozen, split.original, *trees)


def _check_moves(params: Params, optimizer: OptimizerConfig) -> None:
    """`check_parameters_can_move`, whose mend is said by the names of options."""
    try:
        check_parameters_can_move(params, optimizer)
    except UserError as error:
        raise UserError(
            "what is trained has 16 bits a number, which rounds updates away, so that training would not "
            "move it: load the model with --param-dtype float32 (a new one: --arch.param-dtype), or give "
            "--optimizer.rounding kahan or stochastic"
        ) from error


def init_sharded_state(
    init: Callable[..., State], trained: Params, frozen: Params, *keys: PRNGKeyArray
) -> State:
    """`init(trained, *keys)`, every leaf made where it will live, beside what is frozen."""
    state: Any = distributed.init_sharded(init, trained, *keys)
    if frozen is None:
        return state
    learner = dataclasses.replace(state.learner, frozen=distributed.shard_params(frozen))
    return dataclasses.replace(state, learner=learner)


def state_shapes(init: Callable[..., State], trained: Params, frozen: Params, *keys: PRNGKeyArray) -> State:
    """The same of shapes, in shapes."""
    state: Any = jax.eval_shape(init, trained, *keys)
    return dataclasses.replace(state, learner=dataclasses.replace(state.learner, frozen=frozen))


def print_trainable_parameters(run: option_groups.RunOptions, learner: TrainState) -> None:
    """Prints which leaves are trained, where not all are."""
    if not run.quiet and learner.frozen is not None and distributed.is_main_process():
        print(adapters.trainable_table(learner.params, learner.frozen))
