"""Each family of models against the frozen checkpoints of `transformers`, as a Markdown table of errors.

    python tools/tables/family_table.py  # or: python tools/tables/family_table.py --cases llama gemma2

For every checkpoint in tests/golden/hf_*: the largest difference of logits over rows without padding, padded
on the left and padded on the right; whether 32 greedy tokens through the cache are the same, and the largest
difference between their log-probs as sampled and as scored by a whole pass; how many saved tensors differ in
any bit from those that were loaded; the largest differences between logits with a fresh LoRA on every kernel
and without (rounding, where there are biases), and with a random LoRA and with the same merged.
(tools/goldens/make_goldens_hf.py made the checkpoints.)
"""

import dataclasses
import functools
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
import tyro
from rich.progress import track
from safetensors.numpy import load_file

from rlhf_jax import models
from rlhf_jax.core.trees import map_named
from rlhf_jax.generation import Sampling, generate
from rlhf_jax.models import adapters, hf

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden"
CASES = tuple(sorted(folder.name.removeprefix("hf_") for folder in GOLDEN.glob("hf_*")))
NEW = 32


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      cases: checkpoints, by the names of their folders without `hf_`.
    """

    cases: tuple[str, ...] = CASES


def logit_error(config: models.ModelConfig, params: Any, expected: dict[str, np.ndarray]) -> float:
    """Over all tokens of the three ways of padding."""
    forward = jax.jit(functools.partial(models.forward, config))
    errors = []
    for side in ("none", "left", "right"):
        mask = expected[f"{side}_mask"]
        logits = np.asarray(forward(params, expected[f"{side}_tokens"], mask=mask))
        errors.append(np.abs(logits - expected[f"{side}_logits"])[mask].max())
    return float(max(errors))


def decoding(config: models.ModelConfig, params: Any, expected: dict[str, np.ndarray]) -> tuple[int, float]:
    """(greedy tokens that differ, largest difference between log-probs of sampler and scorer)."""
    prefill, decode = models.make_decode_fns(config)

    @jax.jit
    def sample_and_score(params, tokens, mask):
        rollout = generate(
            prefill,
            decode,
            params,
            tokens,
            mask,
            jax.random.key(0),
            max_new_tokens=NEW,
            eos_id=-1,
            pad_id=0,
            sampling=Sampling(temperature=0.0),
        )
        return rollout, models.make_logprob_fn(config)(params, rollout.sequences).logp

    rollout, logp = sample_and_score(params, expected["left_tokens"], expected["left_mask"])
    wrong = int(np.sum(np.asarray(rollout.sequences.tokens)[:, -NEW:] != expected["greedy"]))
    return wrong, float(np.abs(np.asarray(rollout.logp - logp))[:, -NEW:].max())


def changed_tensors(case: str, config: models.ModelConfig, params: Any) -> tuple[int, int]:
    """(tensors that came back otherwise, all)."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save(folder, config, params)
        saved = load_file(pathlib.Path(folder) / "model.safetensors")
    original = load_file(GOLDEN / f"hf_{case}" / "model.safetensors")
    names = saved.keys() | original.keys()
    same = [
        name
        for name in names
        if name in saved and name in original and np.array_equal(saved[name], original[name])
    ]
    return len(names) - len(same), len(names)


def lora(config: models.ModelConfig, params: Any, expected: dict[str, np.ndarray]) -> tuple[float, float]:
    """Largest differences of logits: (a fresh one and none, a random one and itself merged)."""

    @jax.jit
    def logits_fn(tree: Any, tokens: Any = expected["none_tokens"]) -> jax.Array:
        return models.forward(config, tree, tokens)

    fresh = adapters.init_adapter(adapters.LoRA(4), params, jax.random.key(0))
    start = np.abs(logits_fn(fresh) - logits_fn(params)).max()
    random = np.random.default_rng(0)

    def stirred(name: str, leaf: jax.Array) -> Any:
        factor = adapters.is_adapter_leaf(name) and leaf.ndim > 0
        return random.normal(0, 0.1, leaf.shape).astype(leaf.dtype) if factor else leaf

    trained = map_named(stirred, fresh)
    drift = np.abs(logits_fn(trained) - logits_fn(adapters.merge_adapter(trained))).max()
    assert np.abs(logits_fn(trained) - logits_fn(params)).max() > 1e-2, "the factors do nothing"
    return float(start), float(drift)


def main() -> None:
    """Parses the command line, measures and prints."""
    options = tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0])
    rows = []
    for case in track(options.cases, description="families", transient=True):
        config, params = hf.load(GOLDEN / f"hf_{case}")
        with np.load(GOLDEN / f"hf_{case}" / "expected.npz") as arrays:
            expected = dict(arrays)
        error = logit_error(config, params, expected)
        wrong, drift = decoding(config, params, expected)
        changed, count = changed_tensors(case, config, params)
        greedy = "same" if wrong == 0 else f"{wrong} differ"
        saved = f"{count} bitwise" if changed == 0 else f"{changed} of {count} differ"
        start, merging = lora(config, params, expected)
        adapted = f"{start:.0e} | {merging:.1e}"
        rows.append(f"| {case} | {error:.1e} | {greedy} | {drift:.1e} | {saved} | {adapted} |")
    print(
        "| checkpoint | logits | 32 greedy tokens | sampler - scorer, nats | tensors saved "
        "| LoRA at the start | LoRA merged |"
    )
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
