"""What a run of the study of overoptimisation left in its folder."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.core import files
from rlhf_jax.evaluation import pass_at_k

# What is made of the members of an ensemble; `single` is the first of them alone.
RULES = ("single", "mean", "worst", "uncertainty")


@dataclasses.dataclass(frozen=True)
class Curve:
    """Gold and proxy reward along the distance to the start, [seeds, points]."""

    label: str
    distance: np.ndarray
    gold: np.ndarray
    proxy: np.ndarray


@dataclasses.dataclass(frozen=True)
class Study:
    """What a folder holds.

    Attributes:
      rewards: held-out accuracy by size, [seeds, amounts of data].
      curves: by method and reward model ("ppo/16"): a curve for each amount of data, or rule.
      lengths: tokens of the last policies' answers, by the same names, [settings, seeds].
    """

    plan: dict[str, Any]
    rewards: dict[str, np.ndarray]
    curves: dict[str, list[Curve]]
    lengths: dict[str, np.ndarray]
    about: dict[str, Any]


def read(folder: Path) -> Study:
    """The study of a folder; stages that are not done are missing."""
    plan, about = (files.read_json(folder / name) for name in ("plan.json", "config.json"))
    names = [*map(str, plan["sizes"]), "ensemble"]
    amounts = [f"{count:,} pairs" for count in plan["pairs"]]
    labels = {name: RULES if name == "ensemble" else amounts for name in names}
    rewards, curves, deviation = {}, {}, np.ones((plan["seeds"], 1))
    for name in names:
        paths = [folder / "rewards" / f"{name}-{number}.npz" for number in range(len(labels[name]))]
        held = [_arrays(path)["1/gold_accuracy"] for path in paths if path.exists()]
        if name != "ensemble" and len(held) == len(amounts):
            rewards[name] = np.stack(held, axis=1)
        pool = _arrays(folder / "best_of_n" / f"{name}.npz")
        if pool:
            deviation = pool["deviation"][:, None]
            curves[f"best_of_n/{name}"] = [
                _best_of_n(label, pool["gold"][:, i] / deviation, pool["proxy"][:, i])
                for i, label in enumerate(labels[name])
            ]
    lengths = {}
    for name in [*(f"ppo/{name}" for name in names), "dpo"]:
        path = folder / name / "results.parquet"
        if path.exists():
            table = _table(path)
            lengths[name] = table["length"][..., -1]
            curves[name] = [
                Curve(
                    label,
                    np.sqrt(np.maximum(table["kl"][i], 0)),  # at the start, rounding may leave it below 0
                    _gains(table["gold"][i]) / deviation,
                    _gains(table["proxy"][i]),
                )
                for i, label in enumerate(labels.get(name.removeprefix("ppo/"), amounts))
            ]
    return Study(plan, rewards, curves, lengths, about)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    return files.read_arrays(path) if files.exists(path) else {}


def _best_of_n(label: str, gold: np.ndarray, proxy: np.ndarray) -> Curve:
    """Some of the n, [seeds, n] each."""
    sizes = np.unique(np.geomspace(1, gold.shape[1], 25).round().astype(int))
    distance = np.sqrt(np.asarray(pass_at_k.best_of_n_kl(jnp.asarray(sizes))))
    everywhere = np.broadcast_to(distance, (len(gold), len(sizes)))
    return Curve(label, everywhere, _gains(gold[:, sizes - 1]), _gains(proxy[:, sizes - 1]))


def _gains(values: np.ndarray) -> np.ndarray:
    return values - values[:, :1]


def _table(path: Path) -> dict[str, np.ndarray]:
    """Columns of a sweep as [settings, seeds, updates]."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    shape = [int(np.max(table[name])) + 1 for name in ("setting", "seed")]
    return {name: np.asarray(table[name]).reshape(*shape, -1) for name in ("gold", "proxy", "kl", "length")}
