"""Plans of runs: from the options of a stage, adapters included, without weights and without a run."""

import contextlib
import json
from pathlib import Path

import jax
import pytest

from rlhf_jax import distributed, models
from rlhf_jax.cli.commands import main
from rlhf_jax.cli.parsing import parse
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.data.tokenizers import byte_tokenizer
from rlhf_jax.models import hf
from rlhf_jax.planning import steps
from rlhf_jax.stages import dpo, edges, grpo, option_checks, ppo, sft

WIDTH, LAYERS, HIDDEN, RANK = 16, 2, 32, 4
LINEARS = LAYERS * (4 * (WIDTH + WIDTH) + 3 * (WIDTH + HIDDEN))
"""Sides of all linear layers: a factor of an adapter has RANK numbers for each."""
VOCABULARY = byte_tokenizer().vocab_size
BASE = VOCABULARY * WIDTH + LAYERS * (4 * WIDTH**2 + 3 * WIDTH * HIDDEN + 2 * WIDTH) + WIDTH
ROWS = [{"prompt": "1 + 1?", "chosen": "2.", "rejected": "3.", "completion": "2."}] * 40
MESH = distributed.abstract_mesh("")
COUNTERS = 64
SCALES = 4 * 7 * LAYERS
"""Bytes of the scales of adapters, one to each linear layer, which do not train."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Hugging Face folder with rows beside it, and without weights."""
    place = tmp_path_factory.mktemp("published")
    config = models.dense_config(
        vocab_size=VOCABULARY, width=WIDTH, num_layers=LAYERS, num_heads=4, intermediate_size=HIDDEN
    )
    params = models.init_params(config, jax.random.key(0))
    models.make_policy(config, params, byte_tokenizer()).save(place)
    (place / "model.safetensors").unlink()
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return place


def words(folder, flags="", out="plan"):
    paths = f"--model {folder} --data {folder / 'rows.jsonl'} --out {folder / out}"
    return f"{paths} --plan here --quiet {flags}".split()


def resident(stage, folder, flags=""):
    """Bytes by part, and the programs."""
    _, step = stage.planned_step(parse(stage.Options, words(folder, flags)))
    return steps.build(step, MESH)


GROUPS = "--batch-size 2 --group-size 4 --max-new-tokens 5 --rewards rlhf_jax.rewards.verifiers:gsm8k_reward"
"""Eight answers a step."""
LORA = f"--adapter.kind lora --adapter.rank {RANK}"


def test_a_full_run_needs_what_its_workload_does(folder):
    config = hf.load_config(folder)
    found, programs = resident(grpo, folder, GROUPS)
    workload = steps.Workload("grpo", config, 8, length=found_length(programs), new_tokens=5, group_size=4)
    expected, _ = steps.build(steps.workload_step(workload), MESH)
    assert expected["batch"] + 8 == found.pop("batch")  # which rewards there are
    del expected["batch"]
    assert found == expected
    assert found["parameters"] == found["reference"] == 4 * BASE
    assert list(programs) == ["update", "generation"]


def found_length(programs):
    """Tokens of a prompt, which the chat template lengthens, with an answer."""
    return programs["generation"].arguments[1].shape[1] + 5


def test_an_adapter_has_the_optimizer_and_the_base_stays(folder):
    for stage, flags, models_trained in (
        (grpo, GROUPS, 1),
        (dpo, "--batch-size 4", 1),
        (ppo, f"{GROUPS} --batch-size 8", 2),
    ):
        found, programs = resident(stage, folder, f"{flags} {LORA}")
        heads = 4 * (WIDTH + 1) * (models_trained - 1)
        adapter = 4 * RANK * LINEARS * models_trained + heads
        assert found["parameters"] == adapter
        assert found["frozen base"] == 4 * BASE + SCALES * models_trained
        assert 0 <= found["optimizer"] - 2 * adapter <= COUNTERS
        assert "reference" not in found
        # What is frozen is an argument of its own, which is neither donated nor returned.
        trained, frozen = programs["update"].arguments[:2]
        assert programs["update"].donated == (0,)
        assert steps.device_bytes(frozen) == found["frozen base"]
        assert trained.learner.frozen is None


def test_a_base_in_four_bits(folder):
    found, _ = resident(grpo, folder, f"{GROUPS} {LORA} --adapter.quantize nf4")
    kernels = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * HIDDEN)
    assert found["frozen base"] < 4 * (BASE - kernels) + kernels
    assert found["parameters"] == 4 * RANK * LINEARS


def test_references_are_held_where_all_is_trained(folder):
    for flags, passed in ("", 0.0), ("--reference each_step", 4 * BASE):
        found, programs = resident(dpo, folder, f"--batch-size 4 {flags}")
        assert found["reference"] == 4 * BASE
        assert steps.device_bytes(programs["update"].arguments[2]) == passed


def test_a_command_with_plan_compiles_and_trains_nothing(folder, capsys):
    temporary = []
    for parts in 1, 2:
        flags = f"--batch-size 32 --max-length 64 --micro-batches {parts}"
        main(["sft", *words(folder, flags, out=f"parts_{parts}")])
        out = folder / f"parts_{parts}"
        plan = json.loads((out / "plan.json").read_text())
        assert {path.name for path in out.iterdir()} == {"plan.json", "digests.json"}
        assert plan["options"]["micro_batches"] == parts
        assert plan["resident_bytes"]["parameters"] == 4 * BASE
        temporary.append(plan["programs"]["update"]["temporary_bytes"])
    assert temporary[1] < 0.75 * temporary[0]
    assert "sft: 32 rows x 64 tokens a step on one device" in " ".join(capsys.readouterr().out.split())


def test_a_plan_is_that_of_the_run_in_its_folder(folder, tmp_path, monkeypatch):
    """Refused in the folder of a run of other options; gone when such a run begins in its own."""
    ours, same, other = (
        parse(sft.Options, words(folder, flags))
        for flags in ("--batch-size 4", "--batch-size 4 --steps 3 --mesh fsdp=8", "--batch-size 8")
    )
    for held, fits in ((same, True), (other, False)):
        options = option_checks.to_json(held)
        monkeypatch.setattr(option_checks, "read_held_run", lambda *_, held=options, **__: held)
        said = contextlib.nullcontext() if fits else pytest.raises(UserError, match="give --plan the same")
        with said:
            option_checks.check(ours, ours.run, "sft")
        files.write_json(tmp_path / edges.PLAN, {"options": options})
        edges.drop_plan_of_another(ours, tmp_path / edges.PLAN)
        assert (tmp_path / edges.PLAN).exists() == fits


def test_devices_are_looked_at_before_data(folder, capsys):
    flags = words(folder, "--data nowhere.jsonl", out="late")
    flags[flags.index("--plan") + 1] = "nope"
    with pytest.raises(SystemExit):
        main(["sft", *flags])
    assert capsys.readouterr().err.startswith("error: --plan 'nope' is not understood")


def test_what_cannot_be_planned_is_said(folder, capsys):
    for command, flags, sentence in (
        ("reward-model", "", "--plan goes with rlhf sft, dpo, ppo and grpo"),
        ("grpo", f"{GROUPS} --routing-replay", "--plan knows no experts of a rollout"),
        ("dpo", "--plan h300:8", "--plan h300:8: there is no such machine"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([command, *words(folder, flags)])
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: {sentence}")
