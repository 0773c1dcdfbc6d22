"""Images through the stages: from the command and from Python, into run folders and back."""

import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

import rlhf_jax as rj
from rlhf_jax import models
from rlhf_jax.cli.commands import main
from rlhf_jax.core.errors import UserError
from rlhf_jax.models.vision.config import VisionConfig
from rlhf_jax.stages import generate
from rlhf_jax.tasks import shapes

SIZES = {"batch_size": 4, "steps": 2, "quiet": True}
HELD = shapes.prompt_rows("heldout", 6, 1)


@pytest.fixture(scope="module")
def policy():
    tokenizer = shapes.shapes_tokenizer().with_special(["<image>"])
    vision = VisionConfig(tokenizer.special_tokens["<image>"], shapes.IMAGE_SIZE, shapes.CELL, 16, 1, 2, 32)
    shape = {"vocab_size": tokenizer.vocab_size, "width": 16, "num_layers": 1, "num_heads": 2}
    config = models.dense_config(**shape, vision=vision)
    return models.make_policy(config, models.init_params(config, jax.random.key(0)), tokenizer)


def moved(before, after):
    """By how much training moved the patch encoder."""
    kernels = [policy.params["vision"]["patches"]["kernel"] for policy in (before, after)]
    return float(np.abs(np.asarray(kernels[0]) - np.asarray(kernels[1])).max())


def logged(trained, name):
    """The first of a number in the log."""
    return next(line[name] for line in trained.metrics if name in line)


@pytest.mark.slow
def test_sft_from_the_command_reads_images_of_rows_and_leaves_a_policy_that_sees(tmp_path, monkeypatch):
    rows = shapes.demonstration_rows("train", 8, 0)
    lines = [json.dumps(row | {"images": [row["images"][0].tolist()]}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    shapes.shapes_tokenizer().save(tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    arch = "--arch.width 16 --arch.layers 1 --arch.heads 2 --arch.kv-heads 1 --arch.vision.image-size 24"
    run = f"sft --data rows.jsonl --tokenizer tokenizer --out run --steps 2 --batch-size 4 --quiet {arch}"
    main([*run.split(), "--arch.vision.layers", "1", "--packing"])
    loaded = rj.load("run")
    assert loaded.config.vision.image_size == 24
    asked = [{"role": "user", "content": [{"type": "image", "image": rows[0]["images"][0]}]}]
    assert isinstance(loaded.chat(asked, max_new_tokens=2), str)


@pytest.fixture
def say(policy, tmp_path, monkeypatch, capsys):
    """`rlhf generate` of the policy, from a folder with two images and rows that show them."""
    monkeypatch.setattr(generate, "load", lambda _: policy)
    monkeypatch.chdir(tmp_path)
    for place, name in enumerate(("first.png", "second.png")):
        Image.fromarray(HELD[place]["images"][0]).save(name)

    def run(*words, typed=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        main(["generate", "--model", "here", "--max-new-tokens", "3", *words])
        return capsys.readouterr().out

    return run


def test_generate_answers_to_images(say, policy, tmp_path):
    """By a flag, in rows and in a chat: what the policy's own `chat` says to the same image."""
    question = HELD[0]["prompt"]
    greedy = ("--json", "sample", "--temperature", "0")
    asked = ("--prompt", question, "--image")
    first, second = (json.loads(say(*asked, name, *greedy)) for name in ("first.png", "second.png"))
    parts = [{"type": "image", "image": "first.png"}, {"type": "text", "text": question}]
    expected = policy.chat([{"role": "user", "content": parts}], max_new_tokens=3, temperature=0.0)
    assert first["answers"][0]["text"] == expected
    assert first["answers"][0]["logp"] != second["answers"][0]["logp"]
    rows = [{"prompt": question, "images": ["second.png"]}, {"prompt": question}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen, unseen = (json.loads(line) for line in say("--file", "rows.jsonl", *greedy).splitlines())
    assert seen["answers"][0]["logp"] == pytest.approx(second["answers"][0]["logp"], abs=1e-4)
    assert unseen["answers"][0]["logp"] != pytest.approx(seen["answers"][0]["logp"], abs=1e-4)
    spoken = say("--image", "first.png", *greedy[1:], typed=f"{question}\n\n{question}\n")
    assert spoken == f"{expected}\n" * 2


@pytest.mark.slow
def test_beams_see_images(say):
    asked = ("--prompt", HELD[0]["prompt"], "--json", "--image")
    scores = {
        name: json.loads(say(*asked, name, "beam"))["answers"][0]["score"]
        for name in ("first.png", "second.png")
    }
    assert scores["first.png"] != scores["second.png"]


@pytest.mark.slow
def test_sft_trains_the_encoder(policy):
    rows, held = (shapes.demonstration_rows(split, 8, 0) for split in ("train", "heldout"))
    trained = rj.sft(policy, rows, eval_rows=held, **SIZES)
    assert moved(policy, trained.policy) > 0


@pytest.mark.slow
def test_dpo_reads_the_images_of_pairs(policy):
    pairs = shapes.preference_rows("train", 8, 0)
    trained = rj.dpo(policy, pairs, eval_rows=pairs[:4], **SIZES)
    assert moved(policy, trained.policy) > 0
    assert logged(trained, "loss") == pytest.approx(np.log(2), abs=1e-4)


@pytest.mark.slow
def test_grpo_samples_and_learns_with_images(policy):
    def length(prompts, completions, images, **_):
        assert all(np.shape(image) == (24, 24, 3) for some in images for image in some)
        return [float(len(text)) for text in completions]

    rows = shapes.prompt_rows("train", 8, 0)
    options = {"max_new_tokens": 4, "group_size": 4, "num_iterations": 2, "learning_rate": 1e-3}
    trained = rj.grpo(policy, rows, rewards=[length], eval_rows=HELD, **SIZES, **options)
    assert moved(policy, trained.policy) > 0
    # The first update is on policy: sampler and trainer agree on every token.
    assert logged(trained, "sampling_logp_diff") < 1e-5


def test_what_cannot_read_images_yet_says_so(policy):
    rows, options = shapes.prompt_rows("train", 4, 0), {"max_new_tokens": 4, **SIZES}
    with pytest.raises(UserError, match="continuous batching reads no images"):
        rj.grpo(policy, rows, rewards=[shapes.right_answer], max_num_seqs=2, **options)
    with pytest.raises(UserError, match="cannot work with images yet"):
        rj.distill(policy, policy, rows, **options)
