"""What the experiment scripts share: options, models, and what a run does at its edges."""

import dataclasses
import functools
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import distributed, models
from rlhf_jax.algorithms import sft
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import write_json
from rlhf_jax.core.train_state import frozen_parts, with_frozen_parts, without_frozen
from rlhf_jax.core.types import Params
from rlhf_jax.data.examples import Overlength, SupervisedExample
from rlhf_jax.data.mixing import MixtureSampler
from rlhf_jax.data.pipeline import BatchSampler
from rlhf_jax.data.tokenizers import Tokenizer, byte_tokenizer, load_tokenizer
from rlhf_jax.metrics import Logger, Thresholds, make_loggers, write_report
from rlhf_jax.models import Policy
from rlhf_jax.stages import embedded
from rlhf_jax.training import LoopConfig, Meter
from rlhf_jax.training.loading import load
from rlhf_jax.training.run_folder import Adaptation, Kind, describe_run, read_held_run, write_model_files

DType = Literal["float32", "bfloat16"]
ModelKind = Literal["transformer", "rnn", "gru", "lstm"]
Options = TypeVar("Options")
Batches = BatchSampler | MixtureSampler


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where a run writes, and how it goes on.

    Attributes:
      out: the run folder: a local one, or an address such as s3://BUCKET/RUN or gs://BUCKET/RUN.
      seed: decides initial weights, order of the data, and sampling.
      resume: go on from the newest whole checkpoint in the run folder, if there is one, and start otherwise;
        --resume auto says the same, --resume never the opposite.
      steps: steps in all.
      save_every: steps between checkpoints.
      eval_every: steps between evaluations on the held-out data; 0 for one at the end.
      max_to_keep: newest checkpoints that are kept.
      quiet: show no progress.
      report: write report.html at the end.
      mesh: how to use several devices: data=2,fsdp=4, further axes tensor, expert, sequence; auto for fsdp
        over all; empty for one device. A run may be resumed on another mesh.
      all_gather_params: for sampling, make parameters whole along fsdp once a batch of answers, in the
        compute dtype, instead of at every token: many times faster where they fit (`rlhf plan` says whether).
      coordinator: how several processes find each other: auto on Cloud TPU, SLURM and Open MPI,
        HOST:PORT,COUNT,INDEX elsewhere; empty for this process alone.
      init_timeout: seconds until all processes must have come.
      heartbeat_timeout: seconds of silence after which a process counts as lost, and the others end.
      profile: steps to record for a profiler, into the folder profile of the run (XProf, Perfetto).
      peak_tflops: bfloat16 TFLOP/s of all devices together, for MFU where the device is not known; 0 for
        what is known of it.
      log: where metrics go besides metrics.jsonl: any of tensorboard, wandb, trackio, mlflow.
      dtype: of computation in the model of --model; None for that of a run, and of a published checkpoint for
        bfloat16 on GPUs and TPUs and float32 on CPUs.
      param_dtype: of its parameters; None for that of a run, and for float32 of a published checkpoint.
      remat: what its backward pass computes again; None for that of a run, and for nothing.
      scan_layers: run its layers as one scan, whose compile time knows no depth; None for as in a run, and
        of a published checkpoint for where it has more than eight layers.
    """

    out: Path
    seed: int = 0
    resume: bool = False
    steps: int = 200
    save_every: int = 100
    eval_every: int = 0
    max_to_keep: int = 2
    quiet: bool = False
    report: bool = True
    mesh: str = ""
    all_gather_params: bool = False
    coordinator: str = ""
    init_timeout: int = 300
    heartbeat_timeout: int = 60
    profile: int = 0
    peak_tflops: float = 0.0
    log: tuple[str, ...] = ("tensorboard",)
    dtype: DType | None = None
    param_dtype: DType | None = None
    remat: models.Remat | None = None
    scan_layers: bool | None = None

    def load(self, name: str) -> Policy:
        """The policy of this name, in the precision and layout that these options say."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return load(name, **dtypes, remat=self.remat, scan_layers=self.scan_layers)

    def loop(self, thresholds: Thresholds = Thresholds()) -> LoopConfig:
        """The part of it that the training loop knows."""
        return LoopConfig(
            self.steps,
            save_every=self.save_every,
            eval_every=self.eval_every,
            max_to_keep=self.max_to_keep,
            quiet=self.quiet,
            profile=self.profile,
            thresholds=thresholds,
        )

    def meter(self, update_flops: float = 0.0) -> Meter:
        """What a step's parts are timed with.

        Args:
          update_flops: operations that the model needs for one update; 0 for no share of the peak.
        """
        return Meter(flops=update_flops, peak_flops=1e12 * self.peak_tflops or None)


@dataclasses.dataclass(frozen=True)
class ArchOptions:
    """A new model, for runs that do not start from another one.

    Attributes:
      kind: a transformer, or the recurrent network of that name: a cell a layer, nothing else.
      width: of the residual stream.
      layers: number of blocks.
      heads: query heads; divide the width.
      kv_heads: key-value heads; divide the heads.
      intermediate_size: width of the feed-forward; 0 for 8/3 of the width.
      experts: above 0, feed-forwards are mixtures of so many experts of the hidden width.
      experts_per_token: how many of them each token goes through.
      router: softmax, balanced by a loss, or sigmoid, whose biases balance the load without one.
      mtp_depth: modules of multi-token prediction, each of which foresees one token more.
      tie_word_embeddings: use the input embedding as output matrix.
      scan_layers: run the blocks as one scan: compile time independent of depth.
      remat: what the backward pass computes again, to save memory.
      param_dtype: dtype of the parameters.
      compute_dtype: dtype of matmuls and activations.
    """

    kind: ModelKind = "transformer"
    width: int = 96
    layers: int = 2
    heads: int = 8
    kv_heads: int = 4
    intermediate_size: int = 0
    experts: int = 0
    experts_per_token: int = 2
    router: Literal["softmax", "sigmoid"] = "softmax"
    mtp_depth: int = 0
    tie_word_embeddings: bool = True
    scan_layers: bool = False
    remat: models.Remat = "none"
    param_dtype: DType = "float32"
    compute_dtype: DType = "float32"

    def config(self, tokenizer: Tokenizer) -> models.ModelConfig:
        """The architecture for this tokenizer's vocabulary.

        Raises:
          UserError: the numbers do not fit each other.
        """
        shape: dict[str, Any] = {
            "vocab_size": tokenizer.vocab_size,
            "width": self.width,
            "num_layers": self.layers,
            "tie_word_embeddings": self.tie_word_embeddings,
            "scan_layers": self.scan_layers,
            "remat": self.remat,
            "param_dtype": self.param_dtype,
            "compute_dtype": self.compute_dtype,
        }
        if self.kind != "transformer":
            if self.experts or self.mtp_depth:
                raise UserError(
                    f"--arch.experts and --arch.mtp-depth mean nothing to --arch.kind {self.kind}: "
                    "leave them out"
                )
            return models.recurrent_config(cell=self.kind, **shape)
        check_divides("--arch.heads", self.heads, "--arch.width", self.width)
        check_divides("--arch.kv-heads", self.kv_heads, "--arch.heads", self.heads)
        dense = models.dense_config(
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            intermediate_size=self.intermediate_size or None,
            mtp_depth=self.mtp_depth,
            **shape,
        )
        if not self.experts:
            return dense
        (block,) = dense.pattern
        assert isinstance(block.feed_forward, models.GatedFeedForward)
        router = models.SoftmaxRouter() if self.router == "softmax" else models.SigmoidRouter()
        mixture = models.MixtureOfExperts(self.experts, self.experts_per_token, block.feed_forward, router)
        return dataclasses.replace(dense, pattern=(dataclasses.replace(block, feed_forward=mixture),))


@dataclasses.dataclass(frozen=True)
class AuxiliaryOptions:
    """What is learned beside the next token, by models that have parts for it.

    Attributes:
      mtp_loss_coef: weight of the loss of multi-token prediction (--arch.mtp-depth).
      router_aux_loss_coef: weight of the load-balance loss (--arch.experts).
      router_z_loss_coef: weight of the z-loss of routers.
      router_bias_update_rate: by how much the biases of sigmoid routers move in a step.
    """

    mtp_loss_coef: float = 0.3
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    router_bias_update_rate: float = 0.001

    def hyper(self, learning_rate: float | None) -> sft.Hyper:
        """The settings of an update."""
        weights = sft.Auxiliary(*map(jnp.float32, dataclasses.astuple(self)))
        return sft.Hyper(jnp.float32(learning_rate), weights)


# Data ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PairOptions:
    """Preference pairs.

    Attributes:
      data: rows with `prompt`, `chosen`, `rejected`: a path, tfds:NAME[:SPLIT], or arithmetic:LEVEL.
      eval_data: held-out pairs; empty for none (the embedded task brings its own).
      max_length: tokens of a prompt with its response; 0 for the longest.
      overlength: whether longer pairs are an error, or dropped and counted.
      pair_count: how many pairs of the embedded task.
      eval_count: how many held-out pairs are evaluated at most.
      soft_labels: learn from the rows' `preference`, how probably the chosen answer is the better one.
    """

    data: str
    eval_data: str = ""
    max_length: int = 0
    overlength: Overlength = "error"
    pair_count: int = 8_000
    eval_count: int = 512
    soft_labels: bool = False


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """Prompts, and what an answer is worth.

    Attributes:
      data: rows with `prompt`, `question` or `messages`: a path, tfds:NAME[:SPLIT], or arithmetic:LEVEL.
      eval_data: held-out prompts; empty for none (the embedded task brings its own).
      rewards: functions by path (`module:function`), run folders of reward models, or JSON files that
        describe a model's ratings or rules, each with @KIND behind it where it is meant only for rows with
        that `kind`, and =WEIGHT where the weight is not 1.
      eval_reward: the reward function of the evaluation; empty for the first of `rewards`.
      max_prompt_length: tokens of a prompt; 0 for the longest.
      overlength: whether longer prompts are an error, or dropped and counted.
      max_new_tokens: tokens of an answer.
      prompt_count: how many prompts of the embedded task.
      eval_count: how many held-out prompts are evaluated at most.
      samples: prompts whose answers before and after training are kept in samples.json.
    """

    data: str
    eval_data: str = ""
    rewards: tuple[str, ...] = ()
    eval_reward: str = ""
    max_prompt_length: int = 0
    overlength: Overlength = "error"
    max_new_tokens: int = 40
    prompt_count: int = 8_000
    eval_count: int = 256
    samples: int = 8


def check_rewards(rewards: Sequence[Any], what: str = "") -> None:
    """Raises: UserError where nothing says what an answer is worth.

    Args:
      rewards: by name, or as objects.
      what: the flags that would do in the place of --rewards.
    """
    if not rewards:
        raise UserError(
            f"nothing says what an answer is worth: give --rewards{what}, such as --rewards my_rewards:exact"
        )


# Models --------------------------------------------------------------------------------------------


def starting_model(
    model: str,
    tokenizer: str | Tokenizer,
    data: str,
    options: ArchOptions,
    run: RunOptions,
    policy: Policy | None = None,
) -> Policy:
    """The policy named `model`, or a new one.

    Args:
      run: how it is loaded, and the seed of a new one.
      tokenizer: itself, or where to find it; empty for that of `model`, of the embedded task, or for bytes.
      policy: given as an object, which takes the place of all that.

    Raises:
      UserError: options that contradict each other, or no policy in `model`.
    """
    if policy is not None:
        return policy
    if model:
        if tokenizer:
            raise UserError("a tokenizer and --model exclude each other: a policy brings its own tokenizer")
        policy = run.load(model)
        if options != ArchOptions():
            ours = options.config(policy.tokenizer)
            models.check_same_architecture(ours, policy.architecture, f"--model {model}")
        return policy
    chosen = find_tokenizer(tokenizer, data)
    config = options.config(chosen)
    params = distributed.init_sharded(functools.partial(models.init_params, config), jax.random.key(run.seed))
    return models.make_policy(config, params, chosen)


def find_tokenizer(tokenizer: str | Tokenizer, data: str) -> Tokenizer:
    """The tokenizer itself, or where it says; empty for that of the embedded task, or for bytes."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if tokenizer:
        return load_tokenizer(tokenizer)
    return embedded.task_tokenizer(data) or byte_tokenizer()


def copied(params: Params) -> Params:
    """Parameters whose buffers may be donated while the originals stay (as the frozen reference)."""
    return jax.tree.map(jnp.copy, params)


def jit_update(update: Callable[..., Any], state: Any) -> Callable[..., Any]:
    """`update(state, ...) -> (state, metrics)`, compiled; the state is donated, and stays where it lives.

    What is frozen is neither donated nor returned: a policy that was given stays as it is.
    """
    shardings = distributed.shardings_of(without_frozen(state))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def compiled(trained: Any, frozen: Any, *rest: Any) -> tuple[Any, Any]:
        new, metrics = update(with_frozen_parts(trained, frozen), *rest)
        return without_frozen(new), metrics

    def run(state: Any, *rest: Any) -> tuple[Any, Any]:
        frozen = frozen_parts(state)
        new, metrics = compiled(without_frozen(state), frozen, *rest)
        return with_frozen_parts(new, frozen), metrics

    return run


def local_indices(sampler: Batches, step: int, repeat: int = 1) -> np.ndarray:
    """Which examples this process brings to the batch of `step`, each of them `repeat` times."""
    indices = np.repeat(sampler.indices(step), repeat)
    return indices[distributed.local_rows(len(indices))]


# Options -------------------------------------------------------------------------------------------

WITHOUT_PREFIX = ("run", "pairs", "prompts", "task")
_POSITIVE = """
    --steps --max-to-keep --batch-size --micro-batches --minibatches --num-minibatches --group-size --epochs
    --num-iterations --num-ppo-epochs --temperature
    --max-new-tokens --demonstrations --pair-count --prompt-count --eval-count --optimizer.clip-norm
    --arch.width --arch.layers --arch.heads --arch.kv-heads --max-seq-length
    --rounds --prompts-per-round --samples-per-prompt
""".split()  # noqa: SIM905 (a list of literals would fill the screen)
# They change how a run is watched, or how long it is, and nothing of what it computes until then.
_MAY_DIFFER = """
    --out --resume --steps --save-every --eval-every --max-to-keep --quiet --report --micro-batches
    --eval-data --eval-reward --eval-count --samples --mesh --all-gather-params --coordinator
    --init-timeout --heartbeat-timeout --profile --peak-tflops --log --engine --prompts --sample-tokens
    --against --remat
""".split()  # noqa: SIM905


def to_json(options: Any) -> Any:
    """Options as JSON types."""
    if dataclasses.is_dataclass(options):
        return {f.name: to_json(getattr(options, f.name)) for f in dataclasses.fields(options)}
    if isinstance(options, list | tuple):
        return [to_json(item) for item in options]
    return options if isinstance(options, bool | int | float | str | None) else str(options)


def flags(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What `to_json` gives of options, by their names on the command line."""
    named: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            named |= flags(value, prefix if name in WITHOUT_PREFIX else f"{prefix}{name}.")
        else:
            named[f"--{prefix}{name}".replace("_", "-")] = value
    return named


def brief(options: Any) -> Any:
    """A stage's options; one far shorter than the script's own gets a shorter warm-up."""
    if options.optimizer.warmup_steps is None:
        return options
    warmup = min(options.optimizer.warmup_steps, options.run.steps // 4)
    return dataclasses.replace(options, optimizer=dataclasses.replace(options.optimizer, warmup_steps=warmup))


def check_divides(part_name: str, part: int, whole_name: str, whole: int) -> None:
    """Raises: UserError where `part` does not divide `whole`."""
    if part < 1 or whole % part:
        raise UserError(f"{whole_name} {whole} is not divisible by {part_name} {part}: change one of them")


def check(options: Any, run: RunOptions, stage: str) -> None:
    """Looks at the options and at the run folder, before anything is read or written.

    Raises:
      UserError: a number out of range, or the folder holds a run that this one cannot go on with.
    """
    ours = flags(to_json(options))
    for name, value in ours.items():
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{name} is not a number: give one")
        if name in _POSITIVE and value <= 0:
            raise UserError(f"{name} {value} is not positive: give a number above 0")
        if name in ("--profile", "--peak-tflops") and value < 0:
            raise UserError(f"{name} {value} is below 0: give 0 for none")
    make_loggers(run.log, run.out, stage=stage)  # refuses names that are none, before anything is read
    if not 0 <= run.seed < 2**32:
        raise UserError(f"--seed {run.seed} is out of range: give one from 0 to {2**32 - 1}")
    check_same_options(options, read_held_run(run.out, stage, resume=run.resume), run.out)


def check_same_options(options: Any, held: Mapping[str, Any], out: Path) -> None:
    """Raises: UserError where a resumed run would compute something else than the one in `out` does."""
    ours, theirs = flags(to_json(options)), flags(held)
    for name in sorted(theirs.keys() & ours.keys() - set(_MAY_DIFFER)):
        if ours[name] != theirs[name]:
            raise UserError(
                f"{out}: its run has {name} {_shown(theirs[name])}, not {_shown(ours[name])}: "
                "give --resume the same options, or choose another --out"
            )


def _shown(value: Any) -> str:
    words = [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return shlex.join(words) or "(none)"


# Edges ---------------------------------------------------------------------------------------------


def start(
    options: Any, run: RunOptions, stage: str, model: Policy, kind: Kind, adaptation: Adaptation | None = None
) -> None:
    """Writes what describes the run into its folder."""
    if not distributed.is_main_process():
        return
    write_model_files(run.out, model, kind, adaptation)
    describe_run(run.out, to_json(options), stage=stage)


def loggers(options: Any, stage: str) -> list[Logger]:
    """What --log names, for the stage of a script whose options hold `run`."""
    run: RunOptions = options.run
    return make_loggers(run.log, run.out, stage=stage, config=to_json(options), resume=run.resume)


def finish(run: RunOptions, samples: Sequence[Mapping[str, Any]] = ()) -> None:
    """Writes the samples, where there are any, and the report."""
    if not distributed.is_main_process():
        return
    if samples:
        write_json(run.out / "samples.json", samples)
    if run.report:
        path = write_report(run.out)
        if not run.quiet:
            print(f"Report: {path}")


def announce(options: RunOptions, model: Policy, data: str) -> None:
    """Says what is about to run."""
    if options.quiet or not distributed.is_main_process():
        return
    size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    print(f"{options.out}: {data}; a model of {size:,} parameters; {options.steps} steps")
    mesh = distributed.current_mesh()
    if mesh.size > 1:
        summary, whole = distributed.describe_shardings(mesh, model.params)
        print(f"Mesh: {distributed.describe_mesh(mesh)}; parameters of {summary}")
        for line in whole:
            print(f"  {line}: its size does not divide")


def show_sample(options: RunOptions, tokenizer: Tokenizer, example: SupervisedExample) -> None:
    """The first sample as the model sees it: ids beside tokens, those that count marked."""
    if not options.quiet and distributed.is_main_process():
        print(f"First sample ({example.where}); * marks the tokens that count:")
        print(tokenizer.table(example.ids[:40].tolist(), example.mask[:40].tolist()))
