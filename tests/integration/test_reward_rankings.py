"""Reward models from rankings of K answers: what they learn, from the command line and from Python."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

import rlhf_jax as rj
from rlhf_jax import losses
from rlhf_jax.core.errors import UserError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.models import dense_config, init_params, make_policy
from rlhf_jax.stages import reward_model
from rlhf_jax.tasks.arithmetic import arithmetic_tokenizer

_SMALL = (
    "--arch.width 16 --arch.layers 1 --arch.heads 2 --arch.kv-heads 1 --batch-size 8 --optimizer.b2 0.95 "
    "--optimizer.warmup-steps 2 --learning-rate 1e-2 --quiet --no-report"
)


def rankings(seed, count):
    """Three to five answers of six digits each, ranked by how many sevens they have; most rows have ties."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(count):
        digits = rng.choice(list("1237"), (int(rng.integers(3, 6)), 6))
        digits[:2, 0] = "1", "7"
        digits[0, 1:] = digits[1, 1:]
        sevens = np.sum(digits == "7", axis=1)
        answers = ["".join(answer) for answer in digits]
        rows.append({"prompt": "1+1=?", "completions": answers, "ranks": (6 - sevens).tolist()})
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(tmp_path):
    write(tmp_path / "train.jsonl", rankings(0, 256))
    write(tmp_path / "held_out.jsonl", rankings(1, 64))

    def run(name, *more):
        words = f"--out {tmp_path / name} --data {tmp_path}/train.jsonl --eval-data {tmp_path}/held_out.jsonl"
        args = [*words.split(), *_SMALL.split(), *map(str, more)]
        reward_model.run(tyro.cli(reward_model.Options, args=args))
        return tmp_path / name

    return run


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["all_pairs", "plackett_luce"])
def test_held_out_rankings_are_put_in_order(run, loss):
    last = read_metrics(run("run", "--loss", loss, "--steps", 80))[-1]
    # By chance half of the pairs, and at most the share of best answers, two of five in most rows.
    assert last["eval/pair_accuracy"] > 0.9
    assert last["eval/top1_accuracy"] > 0.8


@pytest.mark.slow
def test_a_resumed_run_is_the_whole_one(run, tmp_path):
    common = ("--loss", "all_pairs", "--optimizer.total-steps", 4)
    whole = run("whole", *common, "--steps", 4)
    run("halves", *common, "--steps", 2)
    halves = run("halves", *common, "--steps", 4, "--resume")
    last, resumed = (read_metrics(folder)[-1] for folder in (whole, halves))
    assert resumed["loss"] == last["loss"]
    assert resumed["eval/margin"] == last["eval/margin"]
    # Another order of the same answers is other data.
    rows = rankings(0, 256)
    rows[17]["ranks"] = [max(rows[17]["ranks"]) - rank for rank in rows[17]["ranks"]]
    write(tmp_path / "train.jsonl", rows)
    with pytest.raises(UserError, match="data"):
        run("halves", *common, "--steps", 6, "--resume")


def test_what_does_not_fit_is_refused(run, tmp_path):
    ranked = rankings(0, 8)
    cases = (
        (ranked, (), r"train\.jsonl:1: the row ranks \d answers, and the loss is on pairs"),
        (ranked, ("--loss", "all_pair"), "the nearest name is all_pairs"),
        (ranked, ("--loss", "all_pairs", "--soft-labels"), "--soft-labels are of pairs"),
        (ranked, ("--loss", "all_pairs", "--margin-scale", 2), "no row has a `margin`"),
        ([*ranked, ranked[0] | {"ranks": [0]}], ("--loss", "all_pairs"), r"train\.jsonl:9: field 'ranks'"),
    )
    for rows, more, said in cases:
        write(tmp_path / "train.jsonl", rows)
        with pytest.raises(UserError, match=said):
            run("refused", "--steps", 1, *more)


# From Python ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy():
    tokenizer = arithmetic_tokenizer()
    config = dense_config(vocab_size=tokenizer.vocab_size, width=16, num_layers=1, num_heads=2)
    return make_policy(config, init_params(config, jax.random.key(0)), tokenizer)


PAIRS = [{"prompt": "1+1=?", "chosen": str(n + 1), "rejected": str(n), "margin": n} for n in range(4)]


def first_loss(policy, rows, tmp_path, **settings):
    out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    shared = {"steps": 1, "batch_size": 4, "report": False, "quiet": True, "center_rewards_coefficient": 0.0}
    return rj.reward_model(policy, rows, out=out, **shared, **settings).metrics[0]


@pytest.mark.slow
def test_margins_of_rows_are_subtracted(policy, tmp_path):
    """At step 0 all scores are nearly 0, so the loss is the mean of log(1 + exp(m))."""
    margins = 0.5 + 2 * np.arange(4)
    for loss in ("bradley_terry", "plackett_luce"):
        found = first_loss(policy, PAIRS, tmp_path, loss=loss, margin=0.5, margin_scale=2.0)
        slope = np.mean(1 / (1 + np.exp(-margins)))
        expected = np.mean(np.log1p(np.exp(margins))) - slope * found["margin"]
        assert found["loss"] == pytest.approx(expected, abs=0.02), loss


@pytest.mark.slow
def test_a_loss_of_ones_own_sees_rankings(policy, tmp_path):
    seen = []

    def best_of_all(rewards, ranks, mask, *, margin, centring, denominator):
        """The best answer by softmax over all."""
        seen.append((rewards.shape, ranks.shape, mask.shape))
        logp = jax.nn.log_softmax(jnp.where(mask, rewards, -jnp.inf), axis=1)
        loss = -jnp.sum(logp[:, 0]) / denominator
        return loss, {"loss": loss}

    rows = [PAIRS[0], {"prompt": "1+1=?", "completions": ["1", "2", "3"], "ranks": [2, 0, 1]}] * 2
    found = first_loss(policy, rows, tmp_path, loss=best_of_all)
    assert seen[-1] == ((4, 3),) * 3  # before it, the check of what a loss may be
    assert found["loss"] == pytest.approx(np.mean([np.log(2), np.log(3)]), abs=0.1)
    # One on pairs is told apart by the names of what it takes.
    pairs = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in PAIRS]

    def bradley_terry(chosen_reward, rejected_reward, *, margin, centring, denominator):
        return losses.bradley_terry_loss(chosen_reward, rejected_reward, denominator=denominator)

    own = first_loss(policy, pairs, tmp_path, loss=bradley_terry)
    assert own["loss"] == first_loss(policy, pairs, tmp_path)["loss"]
