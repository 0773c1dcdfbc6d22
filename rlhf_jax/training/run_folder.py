"""The run folder: what a stage leaves behind, and how the next one reads it.

run/
  config.json    what was run: command, options, versions, commit, seed, start
  config.yaml    the options alone, as `--config` takes them to run the same again
  model.json     the architecture, which kind of parameters the checkpoints hold, and where these are an
                 adapter's: its description and the base it stands on
  tokenizer/     in the Hugging Face layout
  checkpoints/   see `rlhf_jax.checkpoint`
  metrics.jsonl  one line a step; tensorboard/ has the same
  digests.json   what the files beside it were when they were written
  .lock          while a process runs in the folder: its number and host
"""

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax

from rlhf_jax import distributed, models
from rlhf_jax.checkpoint import CheckpointManager, read_manifest, restore_params
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import Path
from rlhf_jax.core.trees import merge, partition
from rlhf_jax.core.types import Params, PRNGKeyArray
from rlhf_jax.data.tokenizers import Tokenizer, load_tokenizer
from rlhf_jax.models import Policy, ScalarModel, Source, adapters, make_policy
from rlhf_jax.models.gguf_blocks import keep_blocks

Kind = Literal["policy", "actor_critic", "reward_model"]
"""Kinds of `learner/params`: a decoder, `{"policy": decoder, "value": scalar model}`, or a scalar model."""

PACKAGES = ("rlhf_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """Adaptation of another run's model, whose parameters its checkpoints do not repeat.

    Attributes:
      adapter: what is trained.
      base: where the policy that is adapted comes from; None where Python brought it, so that the
        run's folder alone does not make a policy again.
      quantization: how the base's kernels are kept; None for as they are.
    """

    adapter: adapters.Adapter
    base: Source | None
    quantization: adapters.Quantization | None = None

    def adapted(self, base: Params, key: PRNGKeyArray) -> tuple[Params, Params]:
        """(what is trained, what is frozen) of the base's parameters with a fresh adapter."""
        tree = adapters.init_adapter(self.adapter, self._quantized(base), key)
        return partition(tree, adapters.is_trained(self.adapter))

    def _quantized(self, base: Params) -> Params:
        if self.quantization is None:
            return base
        if self.quantization.format != "gguf":
            return adapters.quantize(self.quantization, base)
        if self.base is None:
            raise UserError("the policy was not read from a GGUF file, whose blocks quantize gguf would keep")
        return keep_blocks(base, files.as_local(self.base.folder, "a GGUF file is read"))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that this package runs from, with `+` where files differ from it."""
    root = pathlib.Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if (
            pathlib.Path(git("rev-parse", "--show-toplevel")) != root
        ):  # installed into another project's folder
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


def device() -> str:
    """The devices of all processes in words, such as `8 x TPU v5e`."""
    found = jax.devices()
    return f"{len(found)} x {found[0].device_kind}"


def command_words() -> list[str]:
    """The command that runs, as a person would type it."""
    script = pathlib.Path(sys.argv[0])
    name = ["rlhf"] if script.name in ("rlhf", "__main__.py") else ["python", sys.argv[0]]
    return [*name, *sys.argv[1:]]


def describe_run(folder: Path, config: Mapping[str, Any], **more: Any) -> None:
    """Writes `folder/config.json`, and `folder/config.yaml`, which starts the same run again.

    Raises:
      UserError: another process runs in the folder, or it cannot be written to.
    """
    folder = files.as_path(folder)
    files.hold(folder, "--out")
    files.write_text(folder / "config.yaml", _as_yaml(folder / "config.yaml", config))
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    files.write_json(
        folder / "config.json",
        {
            "command": shlex.join(command_words()),
            "started": started,
            "config": config,
            "versions": versions(),
            "commit": commit(),
            "device": device(),
            **more,
        },
    )


def _as_yaml(path: Path, config: Mapping[str, Any]) -> str:
    """Options as `--config` takes them, but for whether this run went on with an earlier one."""
    import yaml

    plain, words = json.loads(json.dumps(config, default=str)), command_words()
    if isinstance(plain.get("run"), dict):
        plain["run"].pop("resume", None)
    comment = "The options of this run."
    if words[0] == "rlhf" and len(words) > 1:
        plain = {"command": words[1], **plain}
        again = shlex.join([*words[:2], "--config", str(path)])
        comment = f"The same run again: {again} --out ANOTHER_FOLDER (flags override what stands here)"
    return f"# {comment}\n" + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def read_held_run(folder: Path, stage: str, *, resume: bool) -> Mapping[str, Any]:
    """The configuration of the run that `folder` holds; empty where it holds no checkpoint.

    Raises:
      UserError: it holds one and `resume` is False, or that of another stage.
    """
    folder = files.as_path(folder)
    latest = CheckpointManager(folder / "checkpoints").latest_step()
    path = folder / "config.json"
    if latest is None or (resume and not files.is_file(path)):
        return {}
    if not resume:
        raise UserError(
            f"{folder} already holds a run at step {latest}: add --resume to go on with it, "
            "or choose another --out"
        )
    held = files.read_json(path, keys=("config",), remedy="remove it, or choose another --out")
    if (held_stage := held.get("stage", stage)) != stage:
        raise UserError(f"{folder} holds a run of {held_stage}, not of {stage}: choose another --out")
    return held["config"]


def write_model_files(
    folder: Path,
    policy: Policy,
    kind: Kind,
    adaptation: Adaptation | None = None,
) -> None:
    """Writes `folder/model.json` and `folder/tokenizer`, without which checkpoints are only numbers.

    Where there are checkpoints, what describes them stays as it is. Of a model that is none of ours the
    architecture stays unsaid, and `load_policy` cannot read it back: its parameters alone can be restored
    (`checkpoint.restore_params`).

    Raises:
      UserError: the folder holds checkpoints of another architecture, tokenizer or base, or is read-only.
    """
    folder = files.as_path(folder)
    path = folder / "model.json"
    if files.is_file(path) and CheckpointManager(folder / "checkpoints").latest_step() is not None:
        _, held_config, held_tokenizer, held = _read_model_files(folder)
        ours, theirs = (side and side.base for side in (adaptation, held))
        if ours and theirs and ours.digest != theirs.digest:
            raise UserError(
                f"{folder}: its adapter was trained on another model than {ours.folder} holds at "
                f"step {ours.step}: give the one it had, or choose another --out"
            )
        if policy.config is not None and held_config is not None:
            models.check_same_architecture(policy.config, held_config, f"{folder}")
        if held_tokenizer.backend.get_vocab() != policy.tokenizer.backend.get_vocab():
            raise UserError(
                f"{folder}: its run used another tokenizer: give that one, or choose another --out"
            )
        return
    config = None if policy.config is None else models.config_to_dict(policy.config)
    description = {"kind": kind, "config": config}
    if adaptation is not None:
        base = adaptation.base
        description["adapter"] = models.adapter_to_dict(adaptation.adapter)
        description["quantisation"] = models.adapter_to_dict(adaptation.quantization)
        description["base"] = base and {
            "folder": files.relative(folder, base.folder),
            "step": base.step,
            "digest": base.digest,
        }
    files.hold(folder, "--out")
    files.write_json(path, description)
    try:
        files.forget_digests(folder, "tokenizer/")
        policy.tokenizer.save(folder / "tokenizer")
        files.note_folder(folder, "tokenizer/")
    except Exception as error:  # the tokenizers library raises bare Exception for a full disk
        raise UserError(
            f"{folder / 'tokenizer'}: cannot be written ({error}): free or unlock the disk, "
            "or choose another --out"
        ) from error


def load_policy(folder: files.PathLike, *, shapes_only: bool = False) -> Policy:
    """The policy that a run ended with: of SFT, DPO, GRPO, or the actor of PPO.

    An adapter is merged into its base; one that cannot be stands in the parameters as leaves of its own.

    Args:
      shapes_only: parameters are `jax.ShapeDtypeStruct`s, and no weight is read.

    Raises:
      UserError: there is no such run, it trained a reward model, or the base of its adapter is gone or is
        another.
    """
    model, _ = load_unmerged_policy(folder, shapes_only=shapes_only)
    return dataclasses.replace(model, params=_merged(model.params))


def load_unmerged_policy(
    folder: files.PathLike, *, shapes_only: bool = False
) -> tuple[Policy, Adaptation | None]:
    """The same, in which the leaves of an adapter still stand, and how it came out of its base."""
    folder = files.as_path(folder)
    kind, config, tokenizer, adaptation = _read_ours(folder)
    if kind == "reward_model":
        raise UserError(f"{folder} holds a reward model, not a policy: give the run of another stage")
    name = "learner/params/policy" if kind == "actor_critic" else "learner/params"
    if shapes_only:
        params = _decoder_shapes(adaptation, config)
    elif adaptation is None:
        params = _restore(folder, name, models.param_shapes(config))
    else:
        params = _restore_adapted(folder, name, adaptation, config)
    return make_policy(config, params, tokenizer, source=_source(folder, shapes_only)), adaptation


def load_reward_model(folder: Path, *, shapes_only: bool = False) -> ScalarModel:
    """The reward model that a run ended with, its adapter merged.

    Args:
      shapes_only: as of `load_policy`.

    Raises:
      UserError: there is no such run, it trained a policy, or the base of its adapter is gone or is another.
    """
    model, _ = load_unmerged_reward_model(folder, shapes_only=shapes_only)
    body = dataclasses.replace(model.body, params=_merged(model.body.params))
    return dataclasses.replace(model, body=body)


def load_unmerged_reward_model(
    folder: Path, *, shapes_only: bool = False
) -> tuple[ScalarModel, Adaptation | None]:
    """The same, in whose decoder the leaves of an adapter still stand, and how it came out of its base."""
    kind, config, tokenizer, adaptation = _read_ours(folder)
    if kind != "reward_model":
        raise UserError(f"{folder} holds a policy, not a reward model: give a run of rlhf reward-model")
    like = jax.eval_shape(functools.partial(models.init_scalar_model, config), jax.random.key(0))
    if shapes_only:
        params = {**like, "decoder": _decoder_shapes(adaptation, config)}
    elif adaptation is None:
        params = _restore(folder, "learner/params", like)
    else:
        decoder = _restore_adapted(folder, "learner/params/decoder", adaptation, config)
        params = {"decoder": decoder, "head": _restore(folder, "learner/params/head", like["head"])}
    body = make_policy(config, params["decoder"], tokenizer, source=_source(folder, shapes_only))
    return ScalarModel(body, params["head"]), adaptation


def _decoder_shapes(adaptation: Adaptation | None, config: models.ModelConfig) -> Params:
    """Shapes of a run's decoder, with the leaves of its adapter."""
    like = models.param_shapes(config)
    if adaptation is None:
        return like
    return jax.eval_shape(lambda base, key: merge(*adaptation.adapted(base, key)), like, jax.random.key(0))


def _restore(folder: Path, name: str, like: Any) -> Params:
    shardings = distributed.tree_shardings(distributed.current_mesh(), like)
    like = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like, shardings
    )
    return restore_params(files.as_path(folder) / "checkpoints", like, name=name)[1]


def _restore_adapted(folder: Path, name: str, adaptation: Adaptation, config: models.ModelConfig) -> Params:
    """The decoder of an adapter's run: its base with what was trained."""
    base = _load_base(folder, adaptation.base, config).params
    trained, frozen = adaptation.adapted(base, jax.random.key(0))  # of what is frozen, nothing is random
    return merge(_restore(folder, name, jax.eval_shape(lambda: trained)), frozen)


def _load_base(folder: Path, base: Source | None, config: models.ModelConfig) -> Policy:
    """The policy that an adapter stands on, in the layout and precision of the adapter's run."""
    from rlhf_jax.training.loading import load  # which reads run folders by this module

    if base is None:
        raise UserError(
            f"{folder} holds an adapter of a policy that came from Python and not from a folder: load that "
            "policy, and restore the adapter's leaves with rlhf_jax.checkpoint.restore_params"
        )
    if not files.exists(base.folder):
        raise UserError(
            f"{folder} holds an adapter, and the model that it adapts is not at {base.folder}: "
            "put that back, with the adapter's folder as far from it as it was"
        )
    model = load(
        base.folder,
        dtype=config.compute_dtype,
        param_dtype=config.param_dtype,
        remat=config.remat,
        scan_layers=config.scan_layers,
        attention_backend=config.attention_backend,
    )
    assert model.source is not None
    if model.source.digest != base.digest:
        raise UserError(
            f"{folder} holds an adapter of what {base.folder} held at step {base.step}, which now holds "
            f"another model (step {model.source.step}): put the old one back, or train the adapter again"
        )
    return model


def _merged(params: Params) -> Params:
    """Parameters, or their shapes, with the adapter in the kernels where that is possible."""
    if not adapters.can_merge(params):
        return params
    is_array = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    return adapters.merge_adapter(params) if is_array else jax.eval_shape(adapters.merge_adapter, params)


def _source(folder: Path, shapes_only: bool) -> Source:
    folder = files.as_path(folder)
    if shapes_only:  # nothing is read of the checkpoints, of which there may be none
        return Source(folder, 0, "")
    manifest = read_manifest(folder / "checkpoints")
    content = json.dumps(manifest.files, sort_keys=True).encode()
    return Source(folder, manifest.step, hashlib.sha256(content).hexdigest())


def _read_model_files(
    folder: files.PathLike,
) -> tuple[Kind, models.ModelConfig | None, Tokenizer, Adaptation | None]:
    folder = files.as_path(folder)
    path = folder / "model.json"
    try:
        data = json.loads(files.read_text(path))
        kind, config = data["kind"], data["config"] and models.config_from_dict(data["config"])
        if kind not in get_args(Kind):
            raise ValueError(f"kind {kind!r} is none of {', '.join(get_args(Kind))}")
        adaptation = _read_adaptation(folder, data) if data.get("adapter") else None
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: give the folder that a stage wrote with --out") from error
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{path}: not a model description ({error}): run the stage again") from error
    tokenizer = load_tokenizer(folder / "tokenizer")
    for prefix in ("model.json", "tokenizer/"):
        files.check_digests(folder, prefix)
    return kind, config, tokenizer, adaptation


def read_architecture(folder: files.PathLike) -> models.ModelConfig:
    """The architecture of a run, without its parameters.

    Raises:
      UserError: there is no such run, or its description is damaged.
    """
    return _read_ours(files.as_path(folder))[1]


def _read_ours(folder: Path) -> tuple[Kind, models.ModelConfig, Tokenizer, Adaptation | None]:
    kind, config, tokenizer, adaptation = _read_model_files(folder)
    if config is None:
        raise UserError(
            f"{folder} holds a model from wrap(), whose code is not there: restore its parameters with "
            "rlhf_jax.checkpoint.restore_params, and wrap the model again"
        )
    return kind, config, tokenizer, adaptation


def _read_adaptation(folder: Path, data: Mapping[str, Any]) -> Adaptation:
    base = data["base"]
    source = base and Source(files.follow(folder, base["folder"]), int(base["step"]), str(base["digest"]))
    adapter, quantization = (models.adapter_from_dict(data[name]) for name in ("adapter", "quantisation"))
    return Adaptation(adapter, source, quantization)
