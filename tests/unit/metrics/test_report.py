import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.metrics import JSONLLogger
from rlhf_jax.metrics.completions import write_completions
from rlhf_jax.metrics.curves import find_curves, read_curves
from rlhf_jax.metrics.report import TableRow, write_report

METHODS = ("sft", "ppo", "dpo", "grpo")
HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} $x$ \u202e\x00\ud800 & \"'"


def rise(rng, steps, low, high, pace, noise):
    share = 1 - np.exp(-np.arange(steps) / (pace * steps))
    return low + (high - low) * share + rng.normal(0, noise, steps)


def write_stage(folder, stage, steps, **metrics):
    with JSONLLogger(folder, stage=stage) as writer:
        for index in range(steps):
            writer.log({name: values[index] for name, values in metrics.items()}, index + 1)


def write_seed(folder, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    n = int(300 * scale)
    write_stage(
        folder,
        "sft",
        n,
        loss=rise(rng, n, 2.9, 0.34, 0.12, 0.04),
        entropy=rise(rng, n, 2.8, 0.31, 0.14, 0.02),
        exact_match=np.where(np.arange(n) % 20 == 0, rise(rng, n, 0, 0.43, 0.4, 0.02).clip(0, 1), np.nan),
    )
    n = int(160 * scale)
    write_stage(
        folder,
        "reward_model",
        n,
        loss=rise(rng, n, 0.7, 0.2, 0.2, 0.05),
        accuracy=rise(rng, n, 0.5, 0.92, 0.2, 0.03).clip(0, 1),
        margin=rise(rng, n, 0, 3.1, 0.5, 0.2),
    )
    for stage, best, kl in (("ppo", 0.78, 0.55), ("dpo", 0.61, 0.9), ("grpo", 0.95, 0.35)):
        n = int(200 * scale)
        curves = {
            "loss": rise(rng, n, 0.69, 0.31, 0.4, 0.05) if stage == "dpo" else rng.normal(0, 0.02, n),
            "kl": rise(rng, n, 0, kl, 0.6, 0.02).clip(0),
            "length": rise(rng, n, 21, 24 + 4 * kl, 0.4, 0.4),
        }
        if stage != "dpo":
            curves["reward"] = rise(rng, n, -0.4 if stage == "ppo" else 0.42, best * 1.2, 0.35, 0.05)
            curves["entropy"] = rise(rng, n, 0.33, 0.09, 0.4, 0.015)
        curves["exact_match"] = np.where(
            np.arange(n) % 20 == 0, rise(rng, n, 0.42, best, 0.35, 0.02).clip(0, 1), np.nan
        )
        write_stage(folder, stage, n, **curves)


def sample(left, right, other, correct):
    total = left + right + other
    good = f"{left} + {right} = {left + right}\n{left + right} + {other} = {total}\n#### {total}"
    slip = left + right - 10
    bad = f"{left} + {right} = {slip}\n{slip} + {other} = {slip + other}\n#### {slip + other}"
    return {
        "prompt": f"What is {left} + {right} + {other}?",
        "answer": str(total),
        "completions": {
            method: {"text": good if right else bad, "correct": right}
            for method, right in zip(METHODS, correct, strict=True)
        },
    }


def write_run(folder, seeds=(0, 1, 2), scale=0.2):
    """A run folder as the main job leaves it, with made-up numbers. Returns the rows of its table."""
    rng = np.random.default_rng(7)
    for seed in seeds:
        write_seed(folder / f"seed_{seed}", seed, scale)
    means = {"sft": (0.42, 0.0, 20.8, 62), "ppo": (0.77, 0.53, 26.2, 148)}
    means |= {"dpo": (0.60, 0.88, 27.4, 71), "grpo": (0.946, 0.34, 25.3, 121)}
    summary, table = {}, []
    for method, (match, kl, length, seconds) in means.items():
        matches = (match + rng.normal(0, 0.02, len(seeds))).clip(0, 1)
        summary[method] = {
            "exact_match": matches.tolist(),
            "kl": [kl] * len(seeds),
            "length": [length] * len(seeds),
            "seconds": [seconds] * len(seeds),
        }
        half = 4.3 * matches.std() / np.sqrt(len(seeds))
        interval = (matches.mean(), matches.mean() - half, min(matches.mean() + half, 1.0))
        table.append(TableRow(method, interval, kl, length, seconds))
    summary["reward_model"] = {"pair_accuracy": [0.913, 0.902, 0.921][: len(seeds)]}
    config = {
        "command": "python experiments/pipelines/rlhf.py --seeds 3 --out runs/rlhf",
        "started": "2026-03-14T09:26:53+00:00",
        "seeds": list(seeds),
        "task": {"name": "arithmetic", "level": 2, "held_out": 512, "wrong_demonstrations": 0.3},
        "versions": {"rlhf_jax": "0.1.0", "jax": "0.10.2", "flax": "0.12.8", "python": "3.11.9"},
        "config": {
            stage: {
                "learning_rate": 3e-4,
                "steps": 300,
                "batch_size": 64,
                "clip": {"grad_norm": 1.0},
                "seed": None,
            }
            for stage in ("model", "sft", "reward_model", "ppo", "dpo", "grpo")
        },
    }
    chosen = rng.integers(10, 99, (9, 3)).tolist()
    rights = [(False, True, False, True), (False, False, True, True), (True, True, True, True)] * 3
    samples = [sample(*numbers, right) for numbers, right in zip(chosen, rights, strict=True)]
    for name, value in (("summary", summary), ("config", config), ("samples", samples)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    return table


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words += data


def report_page(folder, table=()):
    text = write_report(folder, table).read_text(encoding="utf-8")
    return text, Page(text)


def test_a_whole_run_shows_every_part(tmp_path):
    table = write_run(tmp_path)
    _, page = report_page(tmp_path, table)
    words = " ".join(page.words.split())
    best = max(table, key=lambda row: row.exact_match[0])
    assert best.method == "grpo"
    assert f"GRPO answers {100 * best.exact_match[0]:.0f} %" in words
    for row in table:
        assert f"{100 * row.exact_match[0]:.1f} %" in words
        assert f"{100 * row.exact_match[1]:.1f} to {100 * row.exact_match[2]:.1f}" in words
    for part in ("2 min 28 s", "26.2", "0.53", "91.2 %", "✓ right", "✗ wrong", "Reward margin", "4 more"):
        assert part in words
    for part in (
        "python experiments/pipelines/rlhf.py --seeds 3",
        "0, 1, 2",
        "flax",
        "ppo.clip.grad_norm",
        "What is",
    ):
        assert part in words
    # sft 3, reward model 3, ppo and grpo 6, dpo 4
    assert page.tags.count("svg") == 22


def script_of(text):
    """The one script of a page, whose hash its policy names."""
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'" in text
    )
    return script


def test_the_page_needs_no_network_and_obeys_one_script_only(tmp_path):
    text, page = report_page(tmp_path, write_run(tmp_path))
    script = script_of(text)
    assert not re.search(r"innerHTML|eval|Function|fetch|XMLHttp|import|https?://(?!www\.w3\.org)", script)
    assert not {"link", "iframe", "img", "object", "base", "form"} & set(page.tags)
    assert not [
        name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "action")
    ]
    # In pictures, references stay within the page.
    references = [value for name, value in page.attributes if name == "xlink:href"]
    assert references
    assert all(value.startswith("#") for value in references)
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}


def test_hostile_text_is_shown_and_not_obeyed(tmp_path):
    tokens = {"token/text": [HOSTILE, "<b>"], "token/kl": [0.5, None]}
    completions = {
        "sft": {"text": HOSTILE, "correct": False, **tokens},
        HOSTILE: {"text": "", "correct": None},
    }
    sample = {"prompt": HOSTILE, "answer": HOSTILE, "completions": completions}
    (tmp_path / "samples.json").write_text(json.dumps([sample]))
    config = {"command": HOSTILE, "config": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}}
    config |= {"seeds": [HOSTILE], "started": HOSTILE, "task": {HOSTILE: [HOSTILE]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "summary.json").write_text(json.dumps({HOSTILE: {"exact_match": [0.5]}}))
    lines = [{"stage": HOSTILE, "step": step, "time": 0.0, "loss": 1.0, HOSTILE: 2.0} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = [TableRow(HOSTILE, (0.5, 0.4, 0.6), 0.1, 3.0, 4.0)]
    write_completions(tmp_path, 3, [{"prompt": HOSTILE[:-12], "completion": HOSTILE[:-12], "reward": 1.0}])
    text, page = report_page(tmp_path, table)
    assert "alert" not in script_of(text)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in page.words
    assert "<script>alert(1)</script>" in page.words
    assert "49 }}" not in text
    assert "\\ud800" in page.words


def test_numbers_of_tokens_are_on_the_page_for_its_script(tmp_path):
    numbers = {"logp": -3.25, "kl": 0.5, "token/text": ["a", "", "é", ""]}
    numbers |= {"token/logp": [-1.0, -0.25, -1 / 3, -2.0], "token/kl": [0.5, 0.0, None, 0.0]}
    before = {"text": "no", "token/text": [], "token/logp": []}
    done = {"before": before, "grpo": {"text": "aé", "reward": 0.25, **numbers}}
    (tmp_path / "samples.json").write_text(json.dumps([{"prompt": "p", "answer": None, "completions": done}]))
    of_tokens = {"token/text": ["x"], "token/advantage": [1.5], "token/logp": [-1.0]}
    write_completions(tmp_path, 3, [{"prompt": "p", "completion": "x", "reward": 1.0, **of_tokens}])
    _, page = report_page(tmp_path)
    found = [json.loads(value) for name, value in page.attributes if name == "data-tokens"]
    assert found == [
        [["a", None, 0.5, -1.0], ["é", None, None, -0.3333], ["\u25a0", None, 0.0, -2.0]],
        [["x", 1.5, None, -1.0]],
    ]
    assert "log-prob -3.25, KL 0.5" in " ".join(page.words.split())
    assert [value for name, value in page.attributes if value == "controls tokens"] == ["controls tokens"] * 2


def test_a_single_stage_run_without_table_or_samples(tmp_path):
    write_stage(tmp_path, "sft", 20, loss=np.linspace(3.0, 0.5, 20))
    _, page = report_page(tmp_path)
    words = " ".join(page.words.split())
    assert "SFT: loss 3 at first, 0.5 at the end" in words
    assert page.tags.count("svg") == 1
    assert "table" not in page.tags
    for part in ("Results", "Samples", "How it was run"):
        assert part not in words


def test_the_largest_numbers_there_are_can_be_drawn(tmp_path):
    write_stage(tmp_path, "sft", 4, loss=np.array([1.79e308, -1.79e308, 0.0, 1.0]))
    _, page = report_page(tmp_path)
    assert page.tags.count("svg") == 1


def test_the_headline_of_reinforcement_is_no_loss(tmp_path):
    steps = np.arange(5.0)
    policy = {"loss": 1e-8 * steps, "length": 20 + steps, "reward": 0.25 + 0.125 * steps}
    write_stage(tmp_path / "a", "grpo", 5, **policy)
    _, page = report_page(tmp_path / "a")
    assert "GRPO: reward 0.25 at first, " in page.words
    with JSONLLogger(tmp_path / "b", stage="grpo") as writer:
        writer.log({"eval/score": 0.4375, "eval/length": 7.0}, 0)
        for step in range(5):
            held_out = {"eval/score": 0.96875, "eval/length": 8.0} if step == 4 else {}
            writer.log({name: values[step] for name, values in policy.items()} | held_out, step + 1)
    _, page = report_page(tmp_path / "b")
    assert "GRPO: held-out score 43.8\u00a0% at first, 96.9\u00a0% at the end" in page.words
    with JSONLLogger(tmp_path / "c", stage="grpo") as writer:  # a score may also be a reward
        for step, score in enumerate((-3.0, -1.5, 2.25)):
            writer.log({"eval/score": score}, step)
    _, page = report_page(tmp_path / "c")
    assert "held-out score -3 at first, 2.25 at the end" in page.words
    chart = next(json.loads(value) for name, value in page.attributes if name == "data-chart")
    assert not chart["percent"]
    curves = read_curves(tmp_path / "b")["grpo"]
    assert list(curves["eval/score"][0].steps) == [0, 5]
    assert find_curves(curves, ("length",)) is curves["length"]


def test_equals_are_named_together(tmp_path):
    rows = [("sft", 0.45, 0.4, 0.5), ("ppo", 0.97, 0.96, 0.98), ("dpo", 0.965, 0.95, 0.98)]
    rows += [("grpo", 0.97, 0.96, 0.98)]
    table = [TableRow(name, tuple(shares), 0.1, 20.0, 9.0) for name, *shares in rows]
    _, page = report_page(tmp_path, table)
    said = (
        "PPO and GRPO answer 97\u00a0% of the held-out prompts right, 52 points more than SFT; DPO is within"
    )
    assert said in page.words
    _, page = report_page(tmp_path, table[:2])
    assert "PPO answers 97\u00a0% of the held-out prompts right, 52 points more than SFT" in page.words
    assert "within" not in page.words


def test_an_empty_folder_and_missing_numbers_still_make_a_page(tmp_path):
    _, page = report_page(tmp_path)
    assert "Run report" in page.words
    nan = float("nan")
    rows = [TableRow("ppo", (0.5, nan, nan), nan, nan, nan), TableRow("x_y", (nan, nan, nan), nan, nan, nan)]
    _, page = report_page(tmp_path, rows)
    words = " ".join(page.words.split())
    assert "PPO answers 50 % of the held-out prompts right" in words
    assert "x y" in words
    assert "nan" not in words


def test_curves_join_seeds_and_drop_what_was_not_finite(tmp_path):
    for seed, offset in ((0, 0.0), (2, 1.0), (10, 2.0)):
        values = np.linspace(0, 1, 12) + offset
        values[3] = np.nan
        write_stage(tmp_path / f"seed_{seed}", "ppo", 12, **{"train/reward": values})
    curves = read_curves(tmp_path)["ppo"]["train/reward"]
    assert [curve.values[0] for curve in curves] == [0.0, 1.0, 2.0]
    assert all(list(curve.steps) == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12] for curve in curves)
    _, page = report_page(tmp_path)
    assert "Reward" in page.words


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("summary.json", "{", "summary.json: not JSON"),
        ("samples.json", "{}", "samples.json: holds a dict, not a list"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_missing_run_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        write_report(tmp_path / "nothing")


def test_troubles_stand_in_the_report_with_their_steps_and_what_to_do(tmp_path):
    with JSONLLogger(tmp_path, stage="grpo") as writer:
        for step in range(1, 13):
            found = {"health/kl_explosion": 1} if 4 <= step <= 6 or step == 9 else {}
            writer.log({"loss": 1.0 / step, **found}, step)
    page = write_report(tmp_path).read_text()
    assert "Warnings" in page
    assert re.search(r"GRPO: KL explosion</b>, steps 4 to 6, 9\.", page)
    assert "lower the learning rate" in page
    assert "entropy collapse" not in page


def test_where_the_time_went(tmp_path):
    step, part = np.full(4, 2.0), np.full(4, 1.2)
    save = np.array([np.nan, 0.8, np.nan, 1.2])
    write_stage(
        tmp_path,
        "grpo",
        4,
        **{"loss": np.arange(4.0), "time/mfu": np.full(4, 0.25), "time/step_seconds": step},
        **{"time/rollout_seconds": part, "time/update_seconds": part / 2, "time/save_seconds": save},
    )
    page = write_report(tmp_path).read_text()
    assert "Time: rollout 48% (4.8 s), update 24% (2.4 s), save 20% (2.0 s), rest 8% (0.80 s)." in page
    assert "Share of peak FLOP/s (MFU)" in page
    write_stage(tmp_path / "plain", "sft", 2, loss=np.arange(2.0), **{"time/step_seconds": np.ones(2)})
    assert "Time:" not in write_report(tmp_path / "plain").read_text()
