"""The embedded task as a `tensorflow-datasets` builder; TensorFlow itself is not needed.

Importing this module makes `tfds.builder("arithmetic/level_1", file_format="array_record")` work; read
the result with `as_data_source`. Rows have `prompt`, `completion` and `answer`, so the same files serve
supervised fine-tuning (with slips, in the training split) and reinforcement learning.
"""

import dataclasses
from collections.abc import Iterator

import tensorflow_datasets as tfds

from rlhf_jax.tasks.arithmetic import LEVELS, Level, demonstration_rows


@dataclasses.dataclass(eq=False)
class ArithmeticConfig(tfds.core.BuilderConfig):
    """Configuration of what is written to disk.

    Attributes:
      level: which problems.
      train_rows: demonstrations of the training split.
      heldout_rows: rightly solved problems of the held-out split.
      slip_rate: how often the writer of the demonstrations is careless in a step.
      seed: decides which problems and which slips.
    """

    level: Level = LEVELS[1]
    train_rows: int = 8192
    heldout_rows: int = 512
    slip_rate: float = 0.5
    seed: int = 0


class Arithmetic(tfds.core.GeneratorBasedBuilder):
    """Chains of operations on whole numbers, answered in written steps."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is fetched. Without this, tfds looks for checksums with a package that it does not declare.
    url_infos = None
    BUILDER_CONFIGS = tuple(
        ArithmeticConfig(name=f"level_{number}", level=level, description=str(level))
        for number, level in LEVELS.items()
    )

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict({"prompt": text, "completion": text, "answer": text})
        return self.dataset_info_from_configs(
            features=features, supervised_keys=("prompt", "completion"), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        config = self.builder_config
        assert isinstance(config, ArithmeticConfig)
        return {
            "train": self._generate_examples(
                demonstration_rows(config.level, config.train_rows, config.seed, slip_rate=config.slip_rate)
            ),
            "heldout": self._generate_examples(
                demonstration_rows(
                    config.level, config.heldout_rows, config.seed, slip_rate=0, split="heldout"
                )
            ),
        }

    def _generate_examples(self, rows: list[dict]) -> Iterator[tuple[int, dict[str, str]]]:
        for key, row in enumerate(rows):
            prompt, completion = (turn["content"] for turn in row["messages"])
            yield key, {"prompt": prompt, "completion": completion, "answer": row["answer"]}
