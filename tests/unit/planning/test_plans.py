"""Plans: bytes that are known, what the compiler says, verdicts, and sentences for mistakes."""

import dataclasses
import json
import math
import re
from typing import get_args

import jax
import pytest

from rlhf_jax import distributed, models
from rlhf_jax.cli.commands import main
from rlhf_jax.core.axes import GATHERED_SAMPLING, axis_rules
from rlhf_jax.core.errors import UserError
from rlhf_jax.distributed.accelerator_specs import CHIPS, chip_of
from rlhf_jax.planning import compiled, steps
from rlhf_jax.planning.analytic import analytic_plan
from rlhf_jax.planning.gpu_targets import GPU_TARGETS
from rlhf_jax.stages import plan as plan_stage, plan_tables

CONFIG = models.dense_config(
    vocab_size=272, width=16, num_layers=2, num_heads=4, intermediate_size=32, scan_layers=True, remat="full"
)
PARAMS = 272 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16
SPLIT = PARAMS - 5 * 16  # norms are whole on every device


def work(algorithm, **options):
    options = {"batch": 8, "length": 12, "new_tokens": 4, "group_size": 2, **options}
    return steps.Workload(algorithm, CONFIG, **options)


def step(algorithm, **options):
    return steps.workload_step(work(algorithm, **options))


def test_what_is_resident_on_each_device():
    resident, found = steps.build(step("ppo"), distributed.abstract_mesh("fsdp=4"))
    decoder = 4 * (SPLIT / 4 + 5 * 16)
    head = 4 * (16 + 1)
    assert resident["parameters"] == 2 * decoder + head
    assert resident["reference"] == decoder
    assert resident["reward model"] == decoder + head
    # Two moments, and the counters of optax.
    assert 0 <= resident["optimizer"] - 2 * resident["parameters"] <= 16
    assert list(found) == ["update", "generation", "reward"]
    assert list(steps.build(step("sft"), distributed.abstract_mesh("fsdp=4"))[1]) == ["update"]


def test_the_cache_of_keys_and_values():
    whole = 2 * 2 * 8 * 12 * 16 * 4
    books = 2 * 8 * 12 * 4 + 4  # segments, positions, the length
    assert steps.cache_bytes(step("grpo").generation, distributed.abstract_mesh("fsdp=4")) == pytest.approx(
        (whole + books) / 4
    )
    assert steps.cache_bytes(
        step("grpo").generation, distributed.abstract_mesh("data=2,tensor=4")
    ) == pytest.approx((whole + books) / 8)
    assert steps.cache_bytes(step("dpo").generation, distributed.abstract_mesh("fsdp=4")) == 0


def test_a_step_compiled_for_the_device_at_hand(tmp_path):
    plan = compiled.make_plan(step("sft", micro_batches=2), distributed.make_mesh(), tmp_path)
    update = plan.programs["update"]
    assert update.argument_bytes == pytest.approx(sum(plan.resident.values()), abs=64)
    # Forward, again for the backward pass, and twice in it; the output matrix's chunks are made twice.
    forward = models.forward_flops(CONFIG, rows=8, length=12)
    assert 3 * forward < update.flops < 5 * forward
    assert update.temporary_bytes > 4 * PARAMS
    assert update.traffic_bytes > 2 * 12 * PARAMS
    assert update.collectives == {}
    assert "ENTRY" in (tmp_path / "update.hlo.txt").read_text()
    assert plan.peak_bytes == sum(plan.resident.values()) + update.temporary_bytes + update.output_bytes


def test_plans_on_paper():
    mesh = distributed.abstract_mesh("fsdp=8")
    plan = analytic_plan(work("grpo", batch=16), mesh)
    # Gathered forward and backward, scattered, and gathered for the reference.
    sent = 4 * 7 / 8 * plan.resident["parameters"] * 8
    assert plan.programs["update"].sent_bytes == pytest.approx(sent)
    # Of two epochs both are counted, and the scoring by the policy before them.
    twice = analytic_plan(work("grpo", batch=16, num_ppo_epochs=2), mesh)
    assert twice.programs["update"].sent_bytes == pytest.approx(sent * (2 * 3 + 2) / 4)
    assert plan.programs["generation"].flops > 0
    assert plan.peak_bytes > sum(plan.resident.values()) + plan.resident["parameters"]  # the gradients


def test_a_plan_on_paper_says_what_is_needed_at_least():
    chip, mesh = chip_of("TPU v5 lite"), distributed.abstract_mesh("fsdp=8")
    plan = analytic_plan(work("sft"), mesh)
    assert re.match(r"May fit: at least [1-9][\d.]+ KiB of 15.75 GiB", plan_tables.verdict(plan, chip))
    assert plan_tables.to_json(plan_stage.Options(), plan, mesh, chip)["fits"] is None
    large = dataclasses.replace(plan, resident={"parameters": 20.0 * 2**30})
    assert plan_tables.verdict(large, chip).startswith("Does not fit: at least 20.00 GiB of 15.75 GiB")
    assert plan_tables.to_json(plan_stage.Options(), large, mesh, chip)["fits"] is False


@pytest.mark.parametrize("name", get_args(plan_stage.ChipName))
def test_every_chip_has_a_name_for_people(name, capsys):
    main(["plan", "--chip", name, "--mesh", "fsdp=8", "--batch", "8", "--length", "32"])
    said = capsys.readouterr().out
    chip = plan_stage.chosen_chip(plan_stage.Options(chip=name))
    assert f"on fsdp=8 (8 devices: {chip.name})" in said
    assert "compiled" not in said.partition("compiled programs need")[2]
    assert " x, " not in said


def test_chips_without_a_name_are_none():
    named = {plan_stage.chosen_chip(plan_stage.Options(chip=name)) for name in get_args(plan_stage.ChipName)}
    assert named == set(CHIPS)


@pytest.mark.parametrize(
    ("count", "memory", "work"),
    [
        (0, "0.00 KiB", "0.00 FLOP"),
        (1536, "1.50 KiB", "1.54 kFLOP"),
        (3 * 2**20, "3.00 MiB", "3.15 MFLOP"),
        (2**30, "1.00 GiB", "1.07 GFLOP"),
        (2**42, "4,096.00 GiB", "4.40 TFLOP"),
        (math.nan, "-", "-"),
    ],
)
def test_sizes_for_people(count, memory, work):
    assert plan_tables.gib(count).startswith(memory)
    assert plan_tables.amount(count, "FLOP").startswith(work)


def test_inputs_of_layers_are_kept_on_paper():
    mesh = distributed.abstract_mesh("fsdp=8")
    few, more = (analytic_plan(work("sft", batch=batch), mesh).programs["update"] for batch in (8, 16))
    kept = 8 / 8 * 12 * 16 * 2 * 4  # rows, columns, width, layers, bytes
    assert more.temporary_bytes - few.temporary_bytes == pytest.approx(kept)


def test_parameters_gathered_once_on_paper():
    mesh = distributed.abstract_mesh("fsdp=8")
    often = analytic_plan(work("grpo", batch=16), mesh).programs["generation"]
    with axis_rules(GATHERED_SAMPLING):
        once = analytic_plan(work("grpo", batch=16), mesh).programs["generation"]
    assert once.sent_bytes == pytest.approx(often.sent_bytes / 4)  # of the 4 new tokens
    assert once.temporary_bytes > often.temporary_bytes


def test_targets_are_the_gpus_whose_roofs_are_known():
    for target in GPU_TARGETS.values():
        chip = chip_of(target.description)
        assert chip is not None
        assert target.memory_bytes == pytest.approx(chip.memory_bytes, rel=0.08)
        assert target.memory_bandwidth == pytest.approx(chip.memory_bandwidth, rel=0.05)
        text = target.to_text()
        assert text.count("{") == text.count("}") == 3
        assert f'device_description_str: "{target.description}"' in text


REFUSAL = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 22.50G of 15.75G hbm. Exceeded."


def test_temporaries_alone_that_find_no_room(monkeypatch):
    def refuse(self, *_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(34.08G) exceeds available HBM (31.25G)."
        )

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    plan = compiled.make_plan(step("sft"), distributed.make_mesh())
    assert plan.peak_bytes == pytest.approx(34.08 * 2**30 + sum(plan.resident.values()))


def test_a_compiler_that_fails_is_one_sentence(monkeypatch):
    def fail(self, *_):
        raise jax.errors.JaxRuntimeError("INTERNAL: no tile sizes that satisfy hlo\nfusion.1 = ...")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(UserError, match=r"of cpu fails .* \(INTERNAL: no tile sizes[^\n]*\): other sizes"):
        compiled.make_plan(step("sft"), distributed.make_mesh())


def test_a_mesh_beyond_a_slice_is_told_of_the_slice():
    with pytest.raises(UserError, match=r"there are 1: lower a size, or name a larger slice$"):
        distributed.make_mesh("fsdp=8", devices=jax.devices()[:1])


def test_a_program_that_finds_no_room(monkeypatch):
    def refuse(self, *_):
        raise jax.errors.JaxRuntimeError(REFUSAL)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    plan = compiled.make_plan(step("sft"), distributed.make_mesh())
    assert "Used 22.50G of 15.75G" in plan.too_big
    small = sum(plan.resident.values())
    assert plan.peak_bytes == pytest.approx(22.5 * 2**30, abs=2 * small)
    said = plan_tables.verdict(plan, chip_of("TPU v5 lite"))
    assert said == "Does not fit: 22.50 GiB of 15.75 GiB on each device, 6.75 GiB too much."
    # Of a program without room only the products are known, and nothing is said to take no time.
    cells = [list(column.cells) for column in plan_tables.work_table(plan, chip_of("TPU v5 lite")).columns]
    told = dict(zip(*cells, strict=True))
    assert told["memory read and written"] == told["least time for communication"] == "-"
    assert told["roofline: all overlap - none do"] == "-"
    assert told["least time for compute"] != "-"
    made = plan_tables.to_json(plan_stage.Options(), plan, distributed.make_mesh(), chip_of("TPU v5 lite"))
    assert made["programs"]["update"]["roofline_seconds"]["memory"] is None
    json.dumps(made, allow_nan=False)  # no NaN, which is no JSON


def test_verdicts_and_json():
    prediction = compiled.Prediction(10, 2**30, 3 * 2**30, 197e12, 0.0, {"all-gather": (4, 100e9)}, 1.0)
    plan = compiled.Plan({"parameters": 2.0**30}, {"update": prediction}, 0.0)
    chip = chip_of("TPU v5 lite")
    assert plan_tables.verdict(plan, chip) == "Fits: 5.00 GiB of 15.75 GiB on each device, 10.75 GiB free."
    assert plan_tables.verdict(plan, None) == "Needs 5.00 GiB on each device, whose memory is not known here."
    made = plan_tables.to_json(plan_stage.Options(), plan, distributed.make_mesh(), chip)
    data = json.loads(json.dumps(made))
    assert data["predicted"]
    assert data["fits"]
    least = data["programs"]["update"]["roofline_seconds"]
    assert (least["compute"], least["communication"]) == (1.0, 0.5)
    unknown = dataclasses.replace(prediction, temporary_bytes=math.nan)
    lost = compiled.Plan({}, {"update": unknown}, 0.0)
    assert plan_tables.verdict(lost, chip).startswith("Does not fit: the compiler found no room")
    assert plan_tables.to_json(plan_stage.Options(), lost, distributed.make_mesh(), chip)["fits"] is False


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--model nowhere", "--model nowhere: no such file or folder"),
        ("--batch 0", "--batch 0 is out of range: give 1 or more"),
        ("--batch 6 --micro-batches 4", "--batch 6 cannot be computed in 4 equal parts"),
        ("--algo ppo --length 512", "--new-tokens 512 leaves nothing of --length 512 for the prompt"),
        ("--algo grpo --batch 12", "--batch 12 is no multiple of --group-size 8"),
        ("--mesh fsdp=3", "--mesh fsdp=3 needs 3 devices"),
        ("--chip h300", "--chip h300: give one of v4, v5e, v5p, v6e, tpu7x, a100, h100, h200, b200, gb200"),
        ("--chip h100", "--mesh auto has no devices to count here: write axes and sizes"),
        ("--chip h100 --mesh fsdp=8 --remat none", "a plan by formula is for remat full, and this is none"),
        ("--chip h100 --mesh fsdp=8 --hlo x", "--chip goes by formula and excludes --hlo"),
        ("--topology h100:8x8", "--topology h100:8x8: GPUs have no shape, only a number"),
        (
            "--chip h100 --mesh fsdp=8 --batch 7",
            "a batch of 7 rows cannot be split evenly over the mesh, fsdp=8",
        ),
        ("--chip h100 --topology v5e:8x8", "--chip goes by formula and excludes --topology"),
        ("--topology v5e-64", "--topology 'v5e-64' is not understood: write a generation and its shape"),
        ("--topology h300:8", "--topology h300:8: there is no such machine: write a generation"),
        ("--topology h100:12", "--topology h100:12: there is no such machine: write a generation"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", *words.split()])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")
