"""Published defaults: the page agrees with the table, and options take them where they say nothing."""

import dataclasses
import inspect
from pathlib import Path

import pytest

from rlhf_jax.algorithms import preference
from rlhf_jax.algorithms.unpaired import UNPAIRED_LOSSES
from rlhf_jax.losses import xpo_loss
from rlhf_jax.stages import adapting, defaults, dpo, grpo, option_groups, sft

ROOT = Path(__file__).resolve().parents[3]
METHODS = {"pretrain", "sft", "reward_model", "process_reward", "distill", "ppo", "grpo"}
METHODS |= {"online_dpo", "xpo", "nash_md"}


def test_rows_are_stages_and_losses():
    losses = preference.pair_losses()
    assert set(defaults.PUBLISHED) <= METHODS | losses.keys() | UNPAIRED_LOSSES.keys()
    for name, found in defaults.PUBLISHED.items():
        if found.loss_params:
            loss_fn = losses.get(name, xpo_loss)
            assert found.loss_params.keys() <= inspect.signature(loss_fn).parameters.keys(), name
        assert found.adapter_learning_rate in (None, pytest.approx(10 * found.learning_rate))


def test_every_loss_has_its_row():
    assert preference.pair_losses().keys() | UNPAIRED_LOSSES.keys() <= set(defaults.PUBLISHED)


def test_what_is_left_out_is_filled_in():
    lora = adapting.AdapterOptions(kind="lora")
    assert defaults.fill_published(sft.Options(data="x"), "sft").learning_rate == 2e-5
    assert defaults.fill_published(sft.Options(data="x", adapter=lora), "sft").learning_rate == 2e-4
    part = adapting.AdapterOptions(kind="partial", train=".*")
    assert defaults.fill_published(sft.Options(data="x", adapter=part), "sft").learning_rate == 2e-5
    options = dpo.Options(model="x", pairs=option_groups.PairOptions("x"))
    filled = [defaults.fill_published(options, loss, otherwise="dpo") for loss in ("dpo", "simpo", "my:own")]
    assert [(found.learning_rate, found.beta) for found in filled] == [(1e-6, 0.1), (6e-7, 2.0), (1e-6, 0.1)]
    given = dataclasses.replace(options, beta=0.3, learning_rate=1e-2)
    assert defaults.fill_published(given, "dpo") == given
    prompts = option_groups.PromptOptions("x", rewards=("x:y",))
    assert defaults.fill_published(grpo.Options(model="x", prompts=prompts), "grpo").learning_rate == 1e-6


def test_optimizers_are_those_of_adam():
    for config in (defaults.LINEAR, defaults.COSINE):
        assert (config.b1, config.b2, config.epsilon, config.warmup_ratio) == (0.9, 0.999, 1e-8, 0.03)
        assert config.warmup_steps is None
