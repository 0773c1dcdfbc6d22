"""`rlhf scaling-laws` on runs of others, and on folders of its own."""

import json
import math
import pathlib

import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.cli.commands import main
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import named_leaves
from rlhf_jax.data.tokenizers import byte_tokenizer
from rlhf_jax.stages import scaling_laws
from rlhf_jax.stages.option_groups import ArchOptions
from rlhf_jax.stages.scaling_runs import count_params, read_run
from rlhf_jax.training.run_folder import write_model_files

SIZES, TOKENS = (1e6, 4e6, 16e6), (1e7, 4e7, 1.6e8)
READ = {"embeddings": False, "loss": "eval/loss", "tokens": "tokens", "total": False}


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def loss(size, tokens):
    return 1.5 + 300 / size**0.35 + 500 / tokens**0.3


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Files of nine runs, as TRL would name the metrics."""
    monkeypatch.chdir(tmp_path)
    paths = []
    for size in SIZES:
        for tokens in TOKENS:
            last = {"step": 100, "num_tokens": tokens, "eval_loss": loss(size, tokens)}
            lines = [{"step": 50, "num_tokens": tokens / 2, "eval_loss": 9.0}, last]
            paths.append(write(tmp_path / f"{size:g}_{tokens:g}.jsonl", lines))
    return paths


def of_others(runs, **more):
    named = {"loss": "eval_loss", "tokens": "num_tokens", "tokens_total": True, "resamples": 3}
    params = tuple(size for size in SIZES for _ in TOKENS)
    return scaling_laws.Options(tuple(runs), **{"params": params, **named, **more})


def test_files_of_others_by_the_command_line(runs, capsys):
    words = ["--loss", "eval_loss", "--tokens", "num_tokens", "--tokens-total", "--flops", "1e18"]
    params = [f"{size:g}" for size in SIZES for _ in TOKENS]
    main(["scaling-laws", *map(str, runs), "--params", *params, *words, "--resamples", "3", "--out", "laws"])
    found = json.loads(pathlib.Path("laws/scaling.json").read_text())
    numbers = found["chinchilla"]["numbers"]
    assert numbers["E"]["mean"] == pytest.approx(1.5, rel=1e-3)
    assert numbers["alpha"]["mean"] == pytest.approx(0.35, rel=1e-3)
    sizes = np.geomspace(1e5, 1e11, 100_001)
    best = sizes[np.argmin(loss(sizes, 1e18 / 6 / sizes))]
    assert numbers["N at 1e+18"]["mean"] == pytest.approx(best, rel=1e-2)
    # Sizes and tokens both rise by four: three budgets have runs of three sizes in the middle one only.
    assert [len(one["runs"]) for one in found["isoflops"]] == [3]
    assert found["isoflop_exponent"] is None
    said = capsys.readouterr().out
    assert "Chinchilla" in said
    assert "Kaplan" in said
    picture = pathlib.Path("laws/scaling.svg").read_text()
    assert "N = 4e+06" in picture
    assert "C = 9.6e+14" in picture


def test_a_folder_counts_its_own_tokens_and_parameters(tmp_path):
    lines = [{"step": 0, "eval/loss": 5.5}, {"step": 1, "tokens": 100, "loss": 5.0}]
    lines += [{"step": 3, "tokens": 90, "eval/loss": 4.0}, {"step": 4, "tokens": 80, "loss": 3.9}]
    write(tmp_path / "metrics.jsonl", lines)
    arch, tokenizer = ArchOptions(width=16, layers=1, heads=2, kv_heads=1), byte_tokenizer()
    config = arch.config(tokenizer)
    policy = models.make_policy(config, models.param_shapes(config), tokenizer)
    write_model_files(tmp_path, policy, "policy")
    run = read_run(tmp_path, params=None, **READ)
    # One step of 100 tokens and two of 90; what was evaluated before the first step does not count.
    assert (run.steps.tolist(), run.tokens.tolist(), run.losses.tolist()) == ([3], [280], [4.0])
    shapes = {name: leaf.shape for name, leaf in named_leaves(models.param_shapes(config)).items()}
    everything = sum(math.prod(shape) for shape in shapes.values())
    assert count_params(tmp_path, embeddings=True) == everything
    assert run.params == everything - tokenizer.vocab_size * 16
    assert run.flops == 6 * run.params * 280


def batch_runs(folder):
    """Two learning rates at four batch sizes; the second is twice as slow."""
    paths = []
    for rate in (1, 2):
        for size in (100, 400, 1600, 6400):
            steps = rate * 50 * (1 + 800 / size)
            lines = [{"step": k, "tokens": size, "loss": 4 - 2 * k / steps} for k in range(1, int(steps) + 9)]
            paths.append(write(folder / f"{rate}_{size}.jsonl", lines))
    return paths


def test_batch_sizes(tmp_path):
    paths = batch_runs(tmp_path / "runs")
    options = scaling_laws.Options(
        tuple(paths), out=tmp_path / "found", loss="loss", target_losses=(3.0, 2.0), resamples=20
    )
    scaling_laws.run(options)
    first, second = json.loads((tmp_path / "found/scaling.json").read_text())["batch_sizes"]
    assert first["law"]["min_steps"] == pytest.approx(25)
    assert second["law"]["min_steps"] == pytest.approx(50)
    assert second["numbers"]["critical batch size, tokens"]["mean"] == pytest.approx(800)
    assert all(name.startswith(str(tmp_path / "runs/1_")) for _, _, name in second["rows"])
    assert "loss 2" in (tmp_path / "found/scaling.svg").read_text()
    with pytest.raises(UserError, match="came so low"):
        scaling_laws.run(scaling_laws.Options(tuple(paths), loss="loss", target_losses=(0.5,)))


def test_mistakes_are_one_sentence(runs, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (of_others([]), "no run is given"),
        (of_others(runs[:2]), "--params has 9 numbers for 2 runs"),
        (of_others(runs, params=()), "give --params"),
        (of_others(runs, loss="eval/loss"), "give --loss one of eval_loss, num_tokens"),
        (of_others(runs, tokens="words"), "give --tokens one of"),
        (of_others([empty], params=(1.0,)), "has no metrics"),
        (of_others(runs[:3], params=(1e6,) * 3), "of 1 sizes"),
        (of_others(runs[::3], params=SIZES), "of 1 numbers of tokens"),
        (of_others([runs[0], runs[4], runs[8]], params=SIZES), "3 runs are too few"),
    ]
    for options, said in cases:
        with pytest.raises(UserError, match=said):
            scaling_laws.run(options)
    write(runs[0], [{"step": 1, "num_tokens": 5.0, "eval_loss": float("nan")}])
    with pytest.raises(UserError, match="eval_loss is not above 0 and finite"):
        scaling_laws.run(of_others(runs))
