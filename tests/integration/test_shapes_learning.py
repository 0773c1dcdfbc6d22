"""A policy learns to see: nothing from the questions alone, half from slips, more by GRPO."""

import jax
import pytest

import rlhf_jax as rj
from rlhf_jax import models
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.models.vision.config import LinearProjector, VisionConfig
from rlhf_jax.tasks import shapes

ASKED = {"questions": ["what"], "most": 1}
COSINE = OptimizerConfig(schedule="cosine", warmup_steps=20, end_lr_ratio=0.05)


def new_policy():
    tokenizer = shapes.shapes_tokenizer().with_special(["<image>"])
    vision = VisionConfig(
        tokenizer.special_tokens["<image>"],
        shapes.IMAGE_SIZE,
        shapes.CELL,
        width=64,
        num_layers=1,
        num_heads=4,
        intermediate_size=128,
        projector=LinearProjector(bias=True),
        mean=(0.94, 0.94, 0.94),
        std=(0.25, 0.25, 0.25),
    )
    shape = {"vocab_size": tokenizer.vocab_size, "width": 64, "num_layers": 2, "num_heads": 4}
    config = models.dense_config(**shape, vision=vision)
    return models.make_policy(config, models.init_params(config, jax.random.key(0)), tokenizer)


def learnt_from(rows, steps):
    options = {"batch_size": 64, "steps": steps, "learning_rate": 2e-3, "optimizer": COSINE, "quiet": True}
    return rj.sft(new_policy(), rows, **options).policy


def sampled_score(policy, rows):
    found = rj.evaluate(policy, rows, rewards=[shapes.right_answer], max_new_tokens=4, batch_size=200)
    return found.sampled_score


@pytest.mark.slow
def test_images_are_what_is_learnt_from():
    demonstrations = shapes.demonstration_rows("train", 6000, 0, slip_rate=0.4, **ASKED)
    held = shapes.prompt_rows("heldout", 200, 1, **ASKED)
    blind = sampled_score(learnt_from(shapes.text_only(demonstrations), 80), shapes.text_only(held))
    assert blind < 0.2  # of twelve things, one

    policy = learnt_from(demonstrations, 240)
    imitated = sampled_score(policy, held)
    assert 0.35 < imitated < 0.75

    prompts = shapes.prompt_rows("train", 2000, 2, **ASKED)
    options = {"batch_size": 32, "group_size": 8, "max_new_tokens": 4, "steps": 25, "learning_rate": 1e-3}
    improved = rj.grpo(policy, prompts, rewards=[shapes.right_answer], kl_coef=0.0, quiet=True, **options)
    assert sampled_score(improved.policy, held) > imitated + 0.15
