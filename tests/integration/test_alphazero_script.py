"""AlphaZero from its command line: training, resume, the round robin, and what is refused."""

import json

import numpy as np
import pytest
import tyro

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import write_json
from rlhf_jax.metrics import read_metrics
from rlhf_jax.stages import alphazero as script

_TINY = "--games 8 --num-simulations 4 --play-simulations 4 --widths 16 --openings 4 --save-every 2 --quiet"


def run(out, *more):
    words = f"--out {out} {_TINY}".split()
    script.run(tyro.cli(script.Options, args=[*words, *map(str, more)]))
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_a_run_its_resume_and_its_results(tmp_path):
    whole = run(tmp_path / "whole", "--steps", 4)
    assert [agent["iteration"] for agent in whole["agents"]] == [None, 0, 2, 4, 0, 2, 4]
    points = np.array(whole["points"])
    np.testing.assert_array_equal(points + points.T, 8 * (1 - np.eye(7)))
    assert whole["agents"][0]["elo"] == 0
    assert len(whole["against_every_reply"]) == 6
    assert (tmp_path / "whole" / "elo.svg").stat().st_size > 10_000
    logged = read_metrics(tmp_path / "whole")
    assert len(logged) == 4
    assert {"time/rollout_seconds", "time/update_seconds"} <= set(logged[0])
    # A round robin that was stopped goes on with the matches it has.
    (tmp_path / "whole" / "results.json").unlink()
    played = json.loads((tmp_path / "whole" / "matches.json").read_text())
    kept = dict(list(played.items())[:10])
    write_json(tmp_path / "whole" / "matches.json", kept)
    assert run(tmp_path / "whole", "--steps", 4, "--resume")["points"] == whole["points"]
    with pytest.raises(UserError, match="already holds a run"):
        run(tmp_path / "whole", "--steps", 4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-to-keep", 2, "--steps", 10], "--max-to-keep 2 would remove"),
        (["--num-minibatches", 5], "--num-minibatches 5"),
        (["--openings", 0], "1 or more"),
    ],
)
def test_bad_options(tmp_path, words, said):
    with pytest.raises(UserError, match=said):
        run(tmp_path / "run", *words)
