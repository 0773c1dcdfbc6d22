import json
import re

import numpy as np
import pytest

from rlhf_jax.cli import report, report as command
from rlhf_jax.core.errors import UserError
from rlhf_jax.metrics import JSONLLogger, write_comparison, write_report


def write_run(folder, rate, *, stage="grpo", best=1.0, **more):
    with JSONLLogger(folder, stage=stage) as writer:
        writer.log({"eval/score": 0.25}, 0)
        for step in range(1, 11):
            held_out = {"eval/score": 0.5 * best} if step == 10 else {}
            writer.log({"reward": best * step / 10, "length": 20.0, "kl": 0.1 * step} | held_out, step)
    options = {"run": {"out": str(folder), "seed": 0}, "learning_rate": rate, "group_size": 8} | more
    config = {"stage": stage, "config": options, "commit": "abc123", "versions": {"jax": "0.10.2"}}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def two(tmp_path):
    write_run(tmp_path / "slow", 1e-6)
    write_run(tmp_path / "fast", 1e-5, best=2.0)
    return tmp_path / "slow", tmp_path / "fast"


def charts(text):
    found = re.findall(r'data-chart="([^"]*)"', text)
    return [json.loads(data.replace("&#34;", '"').replace("&quot;", '"')) for data in found]


def plain(text):
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())


def test_results_curves_and_differences_stand_on_one_page(two, tmp_path):
    path = write_comparison(two, tmp_path / "page.html")
    text = path.read_text()
    words = plain(text)
    assert "slow against fast" in words
    assert "held-out score reward KL, nats length, tokens" in words
    assert "slow GRPO 50.0 % 1 1 20" in words
    assert "fast GRPO 100.0 % 2 1 20" in words
    assert "learning_rate 1e-06 1e-05" in words
    assert "run.out" not in words  # where it wrote is no difference
    same = words.partition("settings are the same")[2]
    assert "group_size 8" in same
    assert "learning_rate" not in same
    reward = next(chart for chart in charts(text) if chart["lines"][0]["points"][-1] == [10, 1])
    assert reward["runs"]
    assert [line["name"] for line in reward["lines"]] == ["slow", "fast"]
    assert reward["lines"][1]["points"][0] == [1, 0.2]
    assert len({line["colour"] for line in reward["lines"]}) == 2


def test_what_only_one_run_has_is_folded_and_groups_are_looked_through(tmp_path):
    write_run(tmp_path / "sft", 1e-5, data="a.jsonl", packing=True)
    write_run(tmp_path / "grpo", 1e-5, prompts={"data": "a.jsonl"}, optimizer={"epsilon": 1e-8})
    words = plain(write_comparison([tmp_path / "sft", tmp_path / "grpo"], tmp_path / "page.html").read_text())
    folded = words.partition("settings that not every run has")[2]
    assert "packing true (absent)" in folded
    assert "data a.jsonl a.jsonl" not in words  # the same in both
    assert "prompts.data" not in words
    settings = plain(write_report(tmp_path / "grpo").read_text()).partition("Setting GRPO")[2]
    assert "epsilon" not in settings.partition("Configuration")[0]  # Adam's, which looks like the clip's


def test_the_command_writes_the_page_where_it_is_told(two, tmp_path, capsys):
    one, several = tmp_path / "deep" / "one.html", tmp_path / "several.html"
    report.run(report.Options((two[0],), out=one))
    report.run(report.Options(two, out=several))
    assert capsys.readouterr().out.split() == [str(one), str(several)]
    assert "slow" in one.read_text()
    assert not (two[0] / "report.html").exists()
    assert "slow against fast" in plain(several.read_text())
    report.run(report.Options((two[0],)))
    assert (two[0] / "report.html").exists()


def test_seeds_of_a_run_are_one_curve(tmp_path):
    for seed, best in ((0, 1.0), (1, 3.0)):
        write_run(tmp_path / "many" / f"seed_{seed}" / "grpo", 1e-6, best=best)
    write_run(tmp_path / "one", 1e-6)
    text = write_comparison([tmp_path / "many", tmp_path / "one"], tmp_path / "page.html").read_text()
    rewards = [chart for chart in charts(text) if chart["lines"][1]["points"][-1] == [10, 1]]
    assert rewards[0]["lines"][0]["points"][-1] == [10, 2]


def test_runs_of_equal_names_are_told_apart_by_their_parents(tmp_path):
    for parent in ("a", "b"):
        write_run(tmp_path / parent / "grpo", 1e-6)
    text = write_comparison([tmp_path / "a/grpo", tmp_path / "b/grpo"], tmp_path / "page.html").read_text()
    assert "a/grpo against b/grpo" in text
    assert "Nothing but the folders" in text


def test_what_cannot_be_compared_is_said(two, tmp_path):
    with pytest.raises(UserError, match="1 run folders cannot be compared"):
        write_comparison(two[:1], tmp_path / "page.html")
    with pytest.raises(UserError, match="no such run folder"):
        write_comparison([two[0], tmp_path / "gone"], tmp_path / "page.html")
    with pytest.raises(UserError, match="given twice"):
        write_comparison([two[0], two[0]], tmp_path / "page.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        write_comparison([two[0], tmp_path / "empty"], tmp_path / "page.html")


def test_the_command_takes_one_folder_or_several(two, tmp_path, capsys):
    command.run(command.Options(two, out=tmp_path / "both.html"))
    assert (tmp_path / "both.html").exists()
    command.run(command.Options(two[:1]))
    assert capsys.readouterr().out.split() == [str(tmp_path / "both.html"), str(two[0] / "report.html")]
    with pytest.raises(UserError, match="--watch follows one run"):
        command.run(command.Options(two, watch=True))
    with pytest.raises(UserError, match="no run folder is given"):
        command.run(command.Options(()))


def test_a_watched_run_has_a_page_that_loads_itself_again_until_the_end(two, monkeypatch):
    folder, seen = two[0], []

    def sleep(seconds):
        seen.append((seconds, (folder / "report.html").read_text()))
        if len(seen) == 2:
            raise KeyboardInterrupt
        with JSONLLogger(folder, stage="grpo", resume_step=10) as writer:
            writer.log({"reward": 7.0}, 11)

    monkeypatch.setattr(command.time, "sleep", sleep)
    command.run(command.Options((folder,), watch=True, every=3))
    (first, page), (_, later) = seen
    assert first == 3
    assert '<meta http-equiv="refresh" content="3">' in page
    assert [11, 7] not in charts(page)[1]["lines"][0]["points"]
    assert [11, 7] in charts(later)[1]["lines"][0]["points"]
    assert "refresh" not in (folder / "report.html").read_text().partition("<style>")[0]


def test_how_it_was_run_has_what_decides_a_result(tmp_path):
    write_run(tmp_path, 1e-6, kl_coef=None, adapter={"kind": "lora", "rank": 16})
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"parameters": 1_234_567, "device": "2 x cpu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with JSONLLogger(tmp_path, stage="grpo", resume_step=10) as writer:
        writer.log({"reward": 1.0, "time/memory_peak_bytes": 3 * 2**29, "time/step_seconds": 90.0}, 11)
    words = plain(write_report(tmp_path).read_text())
    for part in ("commit abc123", "device 2 x cpu", "parameters 1,234,567", "peak memory a device 1.50 GiB"):
        assert part in words
    assert "time in steps 1 min 30 s" in words
    settings = words.partition("Setting GRPO")[2]
    assert "group_size 8 learning_rate 1e-06 adapter.kind lora adapter.rank 16 seed 0" in settings
    assert "kl_coef" not in settings.partition("Configuration")[0]  # None is the algorithm's own


def test_settings_of_every_stage_of_a_pipeline(tmp_path):
    write_run(tmp_path / "seed_0" / "sft", 2e-5, stage="sft")
    write_run(tmp_path / "seed_0" / "grpo", 1e-6)
    (tmp_path / "config.json").write_text(json.dumps({"stage": "rlhf", "config": {"seeds": 1}}))
    words = plain(write_report(tmp_path).read_text())
    assert "Setting GRPO SFT" in words
    assert "learning_rate 1e-06 2e-05" in words


def test_samples_on_which_policies_differ_come_first(tmp_path):
    def card(prompt, *correct):
        done = {f"p{n}": {"text": "x", "correct": right} for n, right in enumerate(correct)}
        return {"prompt": prompt, "answer": "", "completions": done}

    cards = [card("all right", True, True, True, True), card("one", True, False, False, False)]
    cards += [card("half", True, True, False, False), card("none", False, False, False, False)]
    (tmp_path / "samples.json").write_text(json.dumps(cards))
    words = plain(write_report(tmp_path).read_text())
    order = sorted(("all right", "one", "half", "none"), key=lambda name: words.index(f"{name} p0"))
    assert order == ["half", "one", "all right", "none"]


def test_a_reward_that_is_no_verdict_stands_beside_its_sample(tmp_path):
    done = {"before": {"text": "x", "reward": 0.25}, "grpo": {"text": "y", "reward": np.pi}}
    (tmp_path / "samples.json").write_text(json.dumps([{"prompt": "p", "answer": None, "completions": done}]))
    words = plain(write_report(tmp_path).read_text())
    assert "reward 0.25" in words
    assert "reward 3.142" in words


def test_completions_of_a_few_steps_best_and_worst(tmp_path):
    from rlhf_jax.metrics.completions import write_completions

    for step in range(1, 21):
        rows = [{"prompt": "p", "completion": f"{step}.{n}", "reward": float(n), "kl": 0.5} for n in range(3)]
        write_completions(tmp_path, step, rows)
    words = plain(write_report(tmp_path).read_text()).partition("Completions over training")[2]
    for best, worst in (("1 p 1.2", "1 p 1.0"), ("20 p 20.2 2 0.5", "20 p 20.0 0 0.5")):
        assert best in words
        assert worst in words
    assert "20.1" not in words
    assert len(re.findall(r"\d+ p \d+\.2", words)) == 5
