"""Facts of a run, from its folder: commit, device, memory, parameters and settings."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import Path
from rlhf_jax.metrics.curves import Curves
from rlhf_jax.metrics.headline import display

# Settings that tell runs of a kind apart, as they are shown: by the last part of their names, or, where that
# alone says too little, by the whole.
TELLING = (
    "model",
    "data",
    "rewards",
    "reward_model",
    "algorithm",
    "loss",
    "steps",
    "batch_size",
    "group_size",
    "micro_batches",
    "num_minibatches",
    "num_iterations",
    "num_ppo_epochs",
    "learning_rate",
    "beta",
    "kl_coef",
    "epsilon",
    "epsilon_low",
    "epsilon_high",
    "value_coef",
    "entropy_coef",
    "gae_lambda",
    "temperature",
    "max_new_tokens",
    "max_length",
    "adapter.kind",
    "adapter.rank",
    "mesh",
    "seed",
)
_NOTHING = (None, "", [], "(from Python)")


def read_json(path: Path, kind: type) -> Any:
    """A JSON file of a run folder, empty where there is none.

    Raises:
      UserError: it is damaged, or holds something of another kind.
    """
    value = files.read_json(path, otherwise=kind(), remedy="mend or remove the file")
    if not isinstance(value, kind):
        raise UserError(
            f"{path}: holds a {type(value).__name__}, not a {kind.__name__}; mend or remove the file"
        )
    return value


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as (dotted name, text) pairs."""
    if not isinstance(value, Mapping):
        return [(prefix, value if isinstance(value, str) else json.dumps(value))]
    return [
        pair
        for name, inner in value.items()
        for pair in flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    ]


def facts(config: Mapping[str, Any], stages: Mapping[str, Curves]) -> list[tuple[str, str]]:
    """(name, value) of what there is to know beside the options."""
    found = [(name, str(config[name])) for name in ("commit", "device") if config.get(name)]
    if isinstance(config.get("parameters"), int):
        found.append(("parameters", f"{config['parameters']:,}"))
    peaks = [curve.values.max() for m in stages.values() for curve in m.get("time/memory_peak_bytes", ())]
    if peaks:
        found.append(("peak memory a device", f"{max(peaks) / 2**30:.2f} GiB"))
    seconds = [
        float(np.nansum(curve.values))
        for metrics in stages.values()
        for name in ("time/step_seconds", "time/save_seconds", "time/eval_seconds")
        for curve in metrics.get(name, ())
    ]
    if seconds:
        from rlhf_jax.metrics.progress import format_seconds

        found.append(("time in steps", format_seconds(sum(seconds))))
    return found


def settings_of_stages(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The telling settings of every stage: of a single one from the folder itself, else from its first seed.

    Returns:
      stages: names for people; rows: (setting, value in each stage).
    """
    configs = {str(config["stage"]): config["config"]} if _is_stage(config) else {}
    seeds = sorted(path for path in files.list_folder(folder) if path.name.startswith("seed_"))
    for path in sorted(files.list_folder(seeds[0])) if seeds else ():
        inner = read_json(path / "config.json", dict) if files.is_folder(path) else {}
        if _is_stage(inner):
            configs = {name: held for name, held in configs.items() if name != config.get("stage")}
            configs[path.name] = inner["config"]
    found = {stage: _telling(options) for stage, options in configs.items()}
    names = [name for name in TELLING if any(name in options for options in found.values())]
    return {
        "stages": [display(stage) for stage in found],
        "rows": [(name, [options.get(name, "") for options in found.values()]) for name in names],
    }


def _is_stage(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("config"), Mapping) and isinstance(config.get("stage"), str)


def _telling(options: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for whole, value in _leaves(options):
        last = whole.rpartition(".")[2]
        name = whole if whole in TELLING else last
        if name in TELLING and value not in _NOTHING and not whole.startswith("optimizer."):
            found.setdefault(name, shown(value))
    if found.get("adapter.kind", "none") == "none":  # its rank is of an adapter that there is not
        found.pop("adapter.kind", None)
        found.pop("adapter.rank", None)
    return found


def _leaves(options: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value), those of outer groups first."""
    own = [(prefix + name, value) for name, value in options.items() if not isinstance(value, Mapping)]
    groups = [(name, value) for name, value in options.items() if isinstance(value, Mapping)]
    return own + [pair for name, group in groups for pair in _leaves(group, f"{prefix}{name}.")]


def shown(value: Any) -> str:
    """A setting as people write it."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
