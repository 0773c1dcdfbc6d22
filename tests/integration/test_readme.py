"""The README's code runs as it stands, and what it says of the repository is so."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import models
from rlhf_jax.algorithms import preference
from rlhf_jax.core.types import Sequences

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def _pairs():
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 11, (2, 4, 6)), jnp.int32)
    mask = jnp.broadcast_to(jnp.arange(6) >= 3, (4, 6))
    positions = jnp.broadcast_to(jnp.arange(6), (4, 6))
    return [Sequences(side, positions, jnp.ones_like(positions), mask) for side in tokens]


def test_own_loss_in_20_lines_trains():
    (block,) = [
        text for text in re.findall(r"```python\n(.*?)```", README, re.S) if "margin_dpo_loss" in text
    ]
    assert len(block.split("def margin_dpo_loss")[1].splitlines()) <= 20
    config = models.dense_config(vocab_size=11, width=16, num_layers=1, num_heads=2)
    logprob_fn = models.make_logprob_fn(config)
    params = models.init_params(config, jax.random.key(0))
    batch = preference.make_batch(logprob_fn, params, *_pairs())
    names = {"logprob_fn": logprob_fn, "params": params, "batch": batch}
    exec(block, names)
    first = float(names["metrics"]["loss"])
    np.testing.assert_allclose(first, np.log1p(np.exp(0.5)), rtol=1e-5)  # no lead yet, a margin of 0.5
    state = names["state"]
    for _ in range(5):
        state, metrics = names["update"](state, preference.Hyper(learning_rate=1e-3, beta=0.5), batch)
    assert float(metrics["loss"]) < first


def test_every_path_in_the_readme_exists():
    tree = re.search(r"```\nrlhf_jax/\n(.*?)```", README, re.S)
    assert tree, "the README has a commented file tree"
    folder = ""
    for line in tree[1].splitlines():
        name = line.split("#")[0].rstrip()
        if not name:
            continue
        path = name.strip()
        if not name.startswith(" "):
            folder = path
        full = folder if not name.startswith(" ") else folder + path
        base = ROOT / "rlhf_jax" / full
        assert base.exists() or (ROOT / full).exists(), (
            f"{full} is in the README's tree but not in the repository"
        )


def test_scripts_and_tools_named_in_the_readme_exist():
    for path in set(re.findall(r"(?:experiments|tools|tests)/[\w/]+\.(?:py|sh|txt)", README)):
        assert (ROOT / path).exists(), path
