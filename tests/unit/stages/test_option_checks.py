"""What a resumed run may change."""

import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.stages import option_checks, sft
from rlhf_jax.stages.option_groups import RunOptions


def options(path, *, steps, schedule="cosine", total_steps=0, num_train_epochs=1.0):
    run = RunOptions(path, steps=steps, num_train_epochs=num_train_epochs)
    return sft.Options(data="rows", run=run, optimizer=OptimizerConfig(schedule, total_steps=total_steps))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("steps", [4, 12])
def test_a_schedule_that_decays_is_not_stretched_by_a_resume(tmp_path, schedule, steps):
    held = option_checks.to_json(options(tmp_path, steps=8, schedule=schedule))
    with pytest.raises(UserError, match=rf"falls over --steps 8, which --steps {steps} would change"):
        option_checks.check_same_options(options(tmp_path, steps=steps, schedule=schedule), held, tmp_path)


def test_nor_by_other_passes_over_the_data(tmp_path):
    held = option_checks.to_json(options(tmp_path, steps=None))
    longer = options(tmp_path, steps=None, num_train_epochs=2.0)
    with pytest.raises(UserError, match=r"--num-train-epochs 1.0, which --num-train-epochs 2.0 would change"):
        option_checks.check_same_options(longer, held, tmp_path)


def test_a_schedule_of_its_own_length_goes_on(tmp_path):
    for same in ({"schedule": "constant"}, {"total_steps": 20}):
        held = option_checks.to_json(options(tmp_path, steps=8, **same))
        option_checks.check_same_options(options(tmp_path, steps=12, **same), held, tmp_path)
    held = option_checks.to_json(options(tmp_path, steps=8))
    option_checks.check_same_options(options(tmp_path, steps=8), held, tmp_path)
