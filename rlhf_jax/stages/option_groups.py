"""Groups of options that stages share: the run, a new model, auxiliary losses, preference pairs, prompts."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp

from rlhf_jax import models
from rlhf_jax.algorithms import sft
from rlhf_jax.algorithms.moving_reference import SyncHyper
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import (
    Count,
    Finite,
    Length,
    LengthOrZero,
    Positive,
    PositiveInt,
    Range,
    Seed,
    Weight,
    Width,
    WidthOrZero,
)
from rlhf_jax.core.types import Scalar
from rlhf_jax.data.examples import Overlength
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.metrics import Thresholds
from rlhf_jax.models import Policy
from rlhf_jax.models.loading import kind_of_checkpoint
from rlhf_jax.rewards.calls import RewardCalls
from rlhf_jax.stages.option_checks import check_divides
from rlhf_jax.stages.vision_options import VisionOptions
from rlhf_jax.training import LoopConfig, Meter
from rlhf_jax.training.loading import load

DType = Literal["float32", "bfloat16"]


ModelKind = Literal["transformer", "rnn", "gru", "lstm"]


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Run options: where it writes, and how it goes on.

    Attributes:
      out: the run folder: a local one, or an address such as s3://BUCKET/RUN or gs://BUCKET/RUN.
      seed: decides initial weights, order of the data, and sampling.
      resume: go on from the newest whole checkpoint in the run folder, if there is one, and start otherwise;
        --resume auto says the same, --resume never the opposite.
      steps: steps in all; None for as many as `num_train_epochs` takes.
      num_train_epochs: passes over the data, where `steps` does not say more.
      save_every: steps between checkpoints.
      eval_every: steps between evaluations on the held-out data; 0 for one at the end.
      max_to_keep: newest checkpoints that are kept.
      quiet: show no progress.
      report: write report.html at the end.
      mesh: how to use several devices: data=2,fsdp=4, further axes tensor, expert, sequence, pipeline; auto
        for fsdp over all; empty for one device. A run may be resumed on another mesh.
      plan: instead of running, compile the step for these devices, which need not be there, and print what it
        needs: v5e:8x8 or h100:8 as `rlhf plan --topology` takes them, or here. Of the model only the
        description is read. For sft, dpo, ppo and grpo; kept as plan.json in the run folder.
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
      attention_backend: how its attention is computed: the fastest that applies (auto) or one by name; over
        columns that --mesh sequence=N splits, ring or ulysses; None for that of a run, and for auto.
    """

    out: Path
    seed: Seed = 0
    resume: bool = False
    steps: PositiveInt | None = None
    num_train_epochs: Positive = 1.0
    save_every: PositiveInt = 100
    eval_every: Count = 0
    max_to_keep: PositiveInt = 2
    quiet: bool = False
    report: bool = True
    mesh: str = ""
    plan: str = ""
    all_gather_params: bool = False
    coordinator: str = ""
    init_timeout: PositiveInt = 300
    heartbeat_timeout: PositiveInt = 60
    profile: Count = 0
    peak_tflops: Weight = 0.0
    log: tuple[str, ...] = ("tensorboard",)
    dtype: DType | None = None
    param_dtype: DType | None = None
    remat: models.Remat | None = None
    scan_layers: bool | None = None
    attention_backend: models.AttentionBackend | None = None

    @property
    def num_steps(self) -> int:
        """Steps in all, once they are known."""
        assert self.steps is not None
        return self.steps

    @property
    def planned_topology(self) -> str:
        """Devices that are not here and that the run is planned for; empty for none."""
        return "" if self.plan == "here" else self.plan

    def load(self, name: str) -> Policy:
        """The policy of this name, in the precision and layout that these options say; shapes in a plan."""
        dtype = self.dtype
        if self.planned_topology and dtype is None and kind_of_checkpoint(name) != "run":
            dtype = "bfloat16"  # as of published checkpoints on the devices that are planned for
        return load(
            name,
            dtype=dtype,
            param_dtype=self.param_dtype,
            remat=self.remat,
            scan_layers=self.scan_layers,
            attention_backend=self.attention_backend,
            shapes_only=bool(self.plan),
        )

    def loop(
        self, thresholds: Thresholds = Thresholds(), completions: "CompletionOptions | None" = None
    ) -> LoopConfig:
        """The part of it that the training loop knows."""
        shown = completions or CompletionOptions(0, 0)
        return LoopConfig(
            self.num_steps,
            save_every=self.save_every,
            eval_every=self.eval_every,
            max_to_keep=self.max_to_keep,
            quiet=self.quiet,
            log_completions=shown.log_completions,
            num_completions_to_print=shown.num_completions_to_print,
            profile=self.profile,
            thresholds=thresholds,
        )

    def meter(self, update_flops: float = 0.0) -> Meter:
        """Meter of a step's parts.

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
      vision: of a model that reads images.
      tie_word_embeddings: use the input embedding as output matrix.
      scan_layers: run the blocks as one scan: compile time independent of depth.
      remat: what the backward pass computes again, to save memory.
      param_dtype: dtype of the parameters.
      compute_dtype: dtype of matmuls and activations.
    """

    kind: ModelKind = "transformer"
    width: Width = 96
    layers: Width = 2
    heads: Width = 8
    kv_heads: Width = 4
    intermediate_size: WidthOrZero = 0
    experts: WidthOrZero = 0
    experts_per_token: Width = 2
    router: Literal["softmax", "sigmoid"] = "softmax"
    mtp_depth: WidthOrZero = 0
    vision: VisionOptions = VisionOptions()
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
            "vision": self.vision.config(tokenizer, self.width, self.heads),
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
    """Auxiliary losses beside the next token's, for models that have parts for them.

    Attributes:
      mtp_loss_coef: weight of the loss of multi-token prediction (--arch.mtp-depth).
      router_aux_loss_coef: weight of the load-balance loss (--arch.experts).
      router_z_loss_coef: weight of the z-loss of routers.
      router_bias_update_rate: by how much the biases of sigmoid routers move in a step.
    """

    mtp_loss_coef: Weight = 0.3
    router_aux_loss_coef: Weight = 0.01
    router_z_loss_coef: Weight = 0.001
    router_bias_update_rate: Weight = 0.001

    def hyper(self, learning_rate: float | None) -> sft.Hyper:
        """The settings of an update."""
        weights = sft.Auxiliary(*map(jnp.float32, dataclasses.astuple(self)))
        return sft.Hyper(jnp.float32(learning_rate), weights)


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
    max_length: LengthOrZero = 0
    overlength: Overlength = "error"
    pair_count: PositiveInt = 8_000
    eval_count: PositiveInt = 512
    soft_labels: bool = False


@dataclasses.dataclass(frozen=True)
class CompletionOptions:
    """Completions that are kept and shown while a run trains.

    Attributes:
      log_completions: steps between tables of what the policy wrote (prompt, completion, each reward,
        advantage, length, logp, KL), as Parquet in the folder completions of the run, and to --log; 0 for
        none.
      num_completions_to_print: rows of such a table that are printed.
    """

    log_completions: Count = 20
    num_completions_to_print: Count = 3


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """Prompts, and what an answer is worth.

    Attributes:
      data: rows with `prompt`, `question` or `messages`: a path, tfds:NAME[:SPLIT],
        reasoning-gym:NAME[:COUNT[:SEED]], or arithmetic:LEVEL.
      eval_data: held-out prompts; empty for none (the embedded task brings its own).
      rewards: functions by path (`module:function`), run folders of reward models, or JSON files that
        describe a model's ratings or rules, each with @KIND behind it where it is meant only for rows with
        that `kind`, and =WEIGHT where the weight is not 1.
      eval_reward: the reward function of the evaluation; empty for the first of `rewards`.
      reward_workers: rows that a reward function scores at a time, each by a call of its own, in threads; 0
        for all rows in one call.
      reward_timeout: seconds that the call of one row may take; a row that takes longer counts as one without
        a score. None for no limit.
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
    reward_workers: Count = 0
    reward_timeout: Positive | None = None
    max_prompt_length: LengthOrZero = 0
    overlength: Overlength = "error"
    max_new_tokens: Length = 256
    prompt_count: PositiveInt = 8_000
    eval_count: PositiveInt = 256
    samples: Count = 8

    @property
    def reward_calls(self) -> RewardCalls:
        """Limits under which reward functions are called."""
        return RewardCalls(self.reward_workers, self.reward_timeout)


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """Process rewards: what each step of an answer is worth, where it ends.

    Attributes:
      process_reward: run folder of a process reward model (`rlhf process-reward`), whose probability that a
        step is right is the reward of that step, beside --rewards or alone; empty for none.
      process_reward_coef: weight of it.
    """

    process_reward: str = ""
    process_reward_coef: Finite = 1.0


@dataclasses.dataclass(frozen=True)
class SyncOptions:
    """A reference that follows the policy (TR-DPO's updates, in RL).

    Attributes:
      ref_model_sync_steps: optimizer steps between two updates of the reference; 0 for the policy as it was
        at the start, which evaluations always compare with.
      ref_model_mixup_alpha: share of the policy in a new reference: 1 takes its place. A small one at every
        step makes the reference a moving average.
    """

    ref_model_sync_steps: Count = 0
    ref_model_mixup_alpha: Annotated[float, Range(0, 1, above=True)] = 0.6

    def hyper(self) -> SyncHyper:
        """The settings of an update."""
        return SyncHyper(self.ref_model_mixup_alpha, max(self.ref_model_sync_steps, 1))

    def check(self, kl_coefs: Sequence[Scalar]) -> None:
        """Raises: UserError where the reference moves and no KL to it has a weight."""
        if self.ref_model_sync_steps and not any(kl_coefs):
            raise UserError(
                "--ref-model-sync-steps moves a reference that no KL is taken to: give --kl-coef above 0"
            )


@dataclasses.dataclass(frozen=True)
class PtxOptions:
    """Text that is to stay likely beside PPO (PPO-ptx, InstructGPT).

    Attributes:
      ptx_data: a .txt file, a folder of them, rows with a field `text` or with conversations as `rlhf sft`
        takes them, or arithmetic:LEVEL; empty for none.
      ptx_coef: weight of its loss, which is a mean over tokens (gamma of InstructGPT).
      ptx_batch_size: rows of it in each mini-batch; None for as many as there are answers.
      ptx_max_length: tokens a row; longer conversations are dropped and counted.
    """

    ptx_data: str = ""
    ptx_coef: Weight = 27.8
    ptx_batch_size: PositiveInt | None = None
    ptx_max_length: Length = 512
