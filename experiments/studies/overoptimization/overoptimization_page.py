"""The page of the study of overoptimisation, and its pictures, from what the stages left in a folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from overoptimization_study import Curve, Study, read

from rlhf_jax.core import files
from rlhf_jax.evaluation.overoptimization import (
    BEST_OF_N,
    REINFORCEMENT_LEARNING,
    Form,
    SeedFit,
    fit,
    fit_seeds,
)
from rlhf_jax.evaluation.statistics import Interval, mean_interval
from rlhf_jax.metrics.pages import commands, kept_remarks, when_and_with
from rlhf_jax.metrics.pictures import name_ends, picture

PICTURES = ("reward_models", "ends", "best_of_n", "ppo", "dpo", "ensembles")

HEAD = """# Overoptimisation of learned rewards

Written by `experiments/studies/overoptimization/overoptimization.py`. On the style task the gold reward of an
answer is known in closed form (`rlhf_jax/tasks/style.py`). Reward models learn from pairs of
answers of the start, judged by people who prefer by gold reward with noise; answers are chosen
(best-of-n) and policies trained (PPO) against them, and DPO learns from the same pairs.
All is on held-out prompts.

Rewards are gains over the start in standard deviations of the start's answers: gold reward by its own
deviation, a proxy by its own, so that a proxy that ranks and measures like gold would run on the gold line.
KL is that to the start in nats an answer: of best-of-n by the bound log n - (n - 1)/n, of policies exactly
at every sampled token. Fitted to the gold reward of all points are the forms of Gao et al. 2022, with d =
sqrt(KL):

    best-of-n        R(d) = d (alpha - beta d)
    PPO and DPO      R(d) = d (alpha - beta log d)

Intervals are of 95 % over seeds: Student's t, for peaks a bootstrap of whole seeds; `inf` where the form
never bends down. Bands in the pictures are the same intervals.
"""


def form_of(name: str) -> Form:
    """The form that is fitted to a curve."""
    return BEST_OF_N if name.startswith("best_of_n") else REINFORCEMENT_LEARNING


def fits(study: Study) -> dict[tuple[str, str], SeedFit]:
    """Fits of all curves."""
    return {
        (name, curve.label): fit_seeds(form_of(name), curve.distance, curve.gold)
        for name, curves in study.curves.items()
        for curve in curves
    }


# Text --------------------------------------------------------------------------------------------------


def page_text(study: Study, remarks: str) -> str:
    """The page."""
    return (
        "\n\n".join(
            [
                HEAD.strip(),
                remarks.strip(),
                *_reward_models(study),
                *_fitted(study),
                *_ensembles(study),
                *_made(study),
            ]
        )
        + "\n"
    )


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(values: Any) -> str:
    return f"{mean_interval(100 * np.asarray(values)):.1f}"


def _reward_models(study: Study) -> list[str]:
    amounts = study.plan["pairs"]
    rows = []
    for size in map(str, study.plan["sizes"]):
        if size not in study.rewards:
            continue
        accuracy = study.rewards[size]
        rows.append([size, *(_percent(accuracy[:, i]) for i in range(len(amounts)))])
    head = ["width", *(f"{count:,} pairs" for count in amounts)]
    return [
        "## Reward models",
        "Held-out pairs whose better answer, by gold reward, gets the higher score, in percent.",
        _rows(head, rows),
        *(["![accuracy of reward models](reward_models.svg)"] if rows else []),
    ]


def _shown(interval: Interval, spec: str = ".2f") -> str:
    return f"{interval:{spec}}"


def _fitted(study: Study) -> list[str]:
    found, rows = fits(study), []
    for name, curves in study.curves.items():
        for number, curve in enumerate(curves):
            fitted = found[name, curve.label]
            highest = np.argmax(curve.gold.mean(axis=0))
            rows.append(
                [
                    name.replace("/", ", "),
                    curve.label,
                    _shown(fitted.alpha),
                    _shown(fitted.beta),
                    _shown(fitted.peak_kl, ".2g"),
                    f"{(curve.distance.mean(axis=0)[highest]) ** 2:.2g}",
                    f"{(curve.distance[:, -1] ** 2).mean():.2g}",
                    _shown(mean_interval(curve.gold[:, highest])),
                    _shown(mean_interval(curve.gold[:, -1])),
                    _shown(mean_interval(curve.proxy[:, -1])),
                    f"{fitted.residual:.2f}",
                    _shown(mean_interval(study.lengths[name][number]), ".1f")
                    if name in study.lengths
                    else "-",
                ]
            )
    head = [
        "method, width of reward model",
        "preferences or rule",
        "alpha",
        "beta",
        "KL at the fitted peak",
        "KL where gold was highest",
        "KL at the end",
        "gold, highest",
        "gold, end",
        "proxy, end",
        "residual",
        "tokens, end",
    ]
    pictures = [
        f"![{name.replace('_', ' ')}]({name}.svg)"
        for name in ("best_of_n", "ppo", "dpo")
        if any(curve.startswith(name) for curve in study.curves)
    ]
    return [
        "## Gold and proxy reward against the distance",
        "A fitted peak beyond the KL at the end is an extrapolation. The proxy of DPO, which it does not "
        "see, is the reward model of the largest width from as many pairs.",
        *(["![gold and learned reward](ends.svg)"] if study.curves else []),
        _rows(head, rows),
        *pictures,
    ]


def _ensembles(study: Study) -> list[str]:
    if not any(name.endswith("/ensemble") for name in study.curves):
        return []
    plan = study.plan
    return [
        "## Ensembles against one model",
        f"{plan['members']} reward models of width {plan['sizes'][-1]} from the same "
        f"{plan['pairs'][len(plan['pairs']) // 2]:,} pairs, with other initial heads and other orders of the "
        "data: one of them, their mean, the worst of their scores, and the mean minus "
        f"{plan['uncertainty_coef']:g} times their variance.",
        "![ensembles](ensembles.svg)",
    ]


def _made(study: Study) -> list[str]:
    settings = ", ".join(f"`{name}` {value}" for name, value in study.plan.items())
    return [
        "## Made",
        f"{when_and_with([study.about])}. Settings: {settings}. Policies and reward models have "
        "two layers and four heads; the optimizer is AdamW with the linear schedule of "
        "`experiments/studies/post_training/post_training.py`, PPO makes one pass over each batch of 64 "
        "answers, and what is not named has its default.",
        commands([study.about]),
    ]


# Pictures ----------------------------------------------------------------------------------------------


def _band(axes: Any, x: np.ndarray, runs: np.ndarray, **style: Any) -> Any:
    """Mean over seeds, [seeds, points], with its interval; the line."""
    found = [mean_interval(column) for column in runs.T]
    (line,) = axes.plot(x, [i.mean for i in found], **style)
    band = {"color": line.get_color(), "alpha": 0.13, "linewidth": 0}
    axes.fill_between(x, [i.low for i in found], [i.high for i in found], **band)
    return line


def draw_curves(path: Path, rows: Sequence[tuple[str, Form, list[Curve]]]) -> None:
    """Gold reward with the form fitted to it, and the learned reward, against sqrt(KL): a panel a curve."""
    columns = max(len(curves) for _, _, curves in rows)
    with picture(path, len(rows), columns, height=1.9, sharex="row", sharey="row") as grid:
        grid = grid.reshape(len(rows), columns)
        for panels, (title, form, curves) in zip(grid, rows, strict=True):
            panels[0].set_ylabel(f"{title}\ngain, standard deviations")
            lines: dict[str, Any] = {}
            for axes, curve in zip(panels, curves, strict=False):
                middle = curve.distance.mean(axis=0)
                order = np.argsort(middle)
                x, fine = middle[order], np.linspace(0, middle.max(), 100)
                fitted = form(fine, *fit(form, curve.distance, curve.gold))
                lines = {"gold reward": _band(axes, x, curve.gold[:, order], color="C0", linewidth=1.6)}
                (lines["fitted form"],) = axes.plot(fine, fitted, color="C2", linestyle=":", linewidth=1.3)
                (lines["learned reward"],) = axes.plot(
                    x, curve.proxy.mean(axis=0)[order], color="C1", linestyle="--", linewidth=1.2
                )
                axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
                axes.set(title=curve.label, xlabel="sqrt(KL to the start, nats)")
            name_ends(panels[len(curves) - 1], lines)


def draw_ends(path: Path, ends: Mapping[str, Mapping[str, Sequence[Interval]]]) -> None:
    """Gold reward at its highest and at the end, and the learned reward at the end: a panel a method.

    Args:
      ends: by title and amount of preferences or rule, the intervals of the three.
    """
    columns = 3
    with picture(path, -(-len(ends) // columns), columns, height=1.9) as grid:
        for number, (axes, (title, rows)) in enumerate(zip(grid, ends.items(), strict=False)):
            places, lines = np.arange(len(rows)), {}
            for which, name in enumerate(("gold, highest", "gold, end", "learned, end")):
                found = [row[which] for row in rows.values()]
                middle = [i.mean for i in found]
                reach = [[i.mean - i.low for i in found], [i.high - i.mean for i in found]]
                lines[name], *_ = axes.errorbar(
                    places + 0.08 * (which - 1), middle, reach, marker="o", markersize=3, capsize=2
                )
            axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
            shown = [label.removesuffix(" pairs").replace("uncertainty", "uncer-\ntainty") for label in rows]
            axes.set_xticks(places, shown)
            axes.set(title=title, xlim=(-0.3, len(rows) - 0.88))
            axes.set_xlabel("preferences" if all(label.endswith("pairs") for label in rows) else "rule")
            if number % columns == 0:
                axes.set_ylabel("gain, standard\ndeviations")
            if number % columns == columns - 1 or number == len(ends) - 1:
                name_ends(axes, lines)


def ends_of(study: Study) -> dict[str, dict[str, list[Interval]]]:
    """What `draw_ends` draws."""
    found: dict[str, dict[str, list[Interval]]] = {}
    for name, curves in study.curves.items():
        for curve in curves:
            highest = np.argmax(curve.gold.mean(axis=0))
            values = curve.gold[:, highest], curve.gold[:, -1], curve.proxy[:, -1]
            found.setdefault(title_of(name), {})[curve.label] = [mean_interval(x) for x in values]
    return found


def title_of(name: str) -> str:
    """A method with its reward model, as pictures name it."""
    method, _, model = name.partition("/")
    said = {"best_of_n": "best-of-n", "ppo": "PPO", "dpo": "DPO"}[method]
    return said if not model else f"{said}, " + ("ensemble" if model == "ensemble" else f"width {model}")


def draw_reward_models(path: Path, pairs: Sequence[int], found: Mapping[str, Sequence[Interval]]) -> None:
    """Accuracy in percent against the amount of data, a line a size."""
    with picture(path, 1, 1, height=2.6) as (axes,):
        lines = {}
        for number, (size, intervals) in enumerate(found.items()):
            x, middle = np.asarray(pairs) * (1 + 0.02 * number), [i.mean for i in intervals]
            reach = [[i.mean - i.low for i in intervals], [i.high - i.mean for i in intervals]]
            lines[f"width {size}"], *_ = axes.errorbar(x, middle, reach, marker="o", markersize=3, capsize=2)
        axes.set(xlabel="preferences", ylabel="held-out pairs ranked as by gold, %")
        axes.set_xscale("log", base=2)
        axes.set_xticks(pairs, [f"{count:,}" for count in pairs])
        axes.set_xlim(0.85 * min(pairs), 1.1 * max(pairs))
        name_ends(axes, lines)


def draw(folder: Path, study: Study) -> None:
    """All pictures, beside the page."""

    def path(name: str) -> Path:
        return folder / f"{name}.svg"

    accuracies = {
        size: [mean_interval(100 * column) for column in accuracy.T]
        for size, accuracy in study.rewards.items()
    }
    if accuracies:
        draw_reward_models(path("reward_models"), study.plan["pairs"], accuracies)
    if study.curves:
        draw_ends(path("ends"), ends_of(study))
    sizes = [str(size) for size in study.plan["sizes"]]
    for method in ("best_of_n", "ppo"):
        names = [size for size in sizes if f"{method}/{size}" in study.curves]
        if names:
            rows = [
                (f"reward model of width {s}", form_of(method), study.curves[f"{method}/{s}"]) for s in names
            ]
            draw_curves(path(method), rows)
    if "dpo" in study.curves:
        draw_curves(path("dpo"), [("DPO on the pairs", form_of("dpo"), study.curves["dpo"])])
    rows = [
        (title, form_of(method), study.curves[f"{method}/ensemble"])
        for method, title in (("best_of_n", "best-of-n"), ("ppo", "PPO"))
        if f"{method}/ensemble" in study.curves
    ]
    if rows:
        draw_curves(path("ensembles"), rows)


def write(page: Path, folder: Path, remarks: str = "") -> None:
    """Writes the page of the study in `folder`, and the pictures beside it.

    Args:
      remarks: what the numbers show, in words; kept from the page that is there where it is empty.

    Raises:
      UserError: the disk is full or read-only.
    """
    study = read(folder)
    files.write_text(page, page_text(study, remarks or kept_remarks(page)))
    draw(page.parent, study)
