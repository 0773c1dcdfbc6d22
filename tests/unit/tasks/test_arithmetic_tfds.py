"""The embedded task on disk, through tensorflow-datasets without TensorFlow."""

import sys

import pytest

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")

from rlhf_jax.tasks.arithmetic import LEVELS, demonstration_rows  # noqa: E402
from rlhf_jax.tasks.arithmetic_tfds import Arithmetic, ArithmeticConfig  # noqa: E402


def texts(source):
    return [{name: value.decode() for name, value in row.items()} for row in source]


def flat(rows):
    turns = [[turn["content"] for turn in row["messages"]] for row in rows]
    return [
        {"prompt": prompt, "completion": completion, "answer": row["answer"]}
        for (prompt, completion), row in zip(turns, rows, strict=True)
    ]


@pytest.mark.parametrize("number", LEVELS)
def test_what_is_built_is_what_the_text_form_makes(tmp_path, number):
    level = LEVELS[number]
    config = ArithmeticConfig("few", level=level, train_rows=30, heldout_rows=7, slip_rate=0.5, seed=3)
    builder = Arithmetic(config=config, data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    for reader in (builder, tfds.builder_from_directory(builder.data_path)):
        sources = reader.as_data_source()
        assert set(sources) == {"train", "heldout"}
        assert texts(sources["train"]) == flat(demonstration_rows(level, 30, 3, slip_rate=0.5))
        assert texts(sources["heldout"]) == flat(
            demonstration_rows(level, 7, 3, slip_rate=0, split="heldout")
        )
    assert "tensorflow" not in sys.modules


def test_every_level_has_a_named_configuration(tmp_path):
    for number, level in LEVELS.items():
        builder = tfds.builder(f"arithmetic/level_{number}", data_dir=tmp_path, file_format="array_record")
        assert builder.builder_config.level == level
