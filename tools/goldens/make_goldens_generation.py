"""Freezes what `transformers` decodes from tests/golden/hf_llama: tests/golden/generation_transformers.npz.

The tests hold our decoders against it. Contrastive search, DoLa and diverse beam search left `transformers`
after version 4, so it takes two runs, each of which renews its own part of the file:

    pip install torch==2.13.0 transformers==5.23.0 && python tools/goldens/make_goldens_generation.py
    pip install torch==2.13.0 transformers==4.49.0 && python tools/goldens/make_goldens_generation.py

prompt, prompt_mask [2, 12]: left-padded
beam_{case}, beam_{case}_scores: n-best of each prompt, padded with 0 after the end
sampler_logits [B, V], sampler_tokens [B, S], {top_k, top_p, min_p, typical_p, repetition} [B, V]: logits
  before and after each rule
contrastive_{k}_{alpha}, dola_{layer}, diverse: tokens
"""

import json
import pathlib
from typing import Any

import numpy as np
import torch
import transformers

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden"
NEW, EOS = 16, 4

BEAMS: dict[str, dict[str, Any]] = {
    "plain": {"num_beams": 4, "num_return_sequences": 4},
    "short": {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0, "early_stopping": True},
    "long": {"num_beams": 5, "num_return_sequences": 2, "length_penalty": 2.0, "early_stopping": "never"},
    "wide": {"num_beams": 24, "num_return_sequences": 24, "length_penalty": 0.6},
}


def load() -> Any:
    """The checkpoint, with the rotary frequencies named as the installed version reads them."""
    folder = GOLDEN / "hf_llama"
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config.get("rope_parameters", {}).get("rope_theta", 10_000.0)
    if transformers.__version__.startswith("4."):
        config.pop("rope_parameters", None)
    config = transformers.LlamaConfig(**config)
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM.from_pretrained(folder, config=config, torch_dtype=torch.float32)
    model.generation_config = transformers.GenerationConfig()
    return model.eval()


def decode(model: Any, prompt: Any, mask: Any, **options: Any) -> dict[str, np.ndarray]:
    """Generated tokens, padded with 0 to `NEW`, and scores where there are any."""
    common = {
        "max_new_tokens": NEW,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    found = model.generate(
        torch.tensor(prompt, dtype=torch.long),
        attention_mask=torch.tensor(mask, dtype=torch.long),
        **{**common, **options},
    )
    tokens = found.sequences[:, prompt.shape[1] :].numpy()
    tokens = np.pad(tokens, ((0, 0), (0, NEW - tokens.shape[1])))
    if "eos_token_id" not in options:  # some versions fill up with the end itself
        tokens[np.cumsum(tokens == EOS, axis=1) > (tokens == EOS)] = 0
    scores = getattr(found, "sequences_scores", None)
    return {"": tokens.astype(np.int32)} | ({} if scores is None else {"_scores": scores.numpy()})


def processors() -> dict[str, np.ndarray]:
    """What the logits processors make of random logits."""
    from transformers.generation import logits_process as found

    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((6, 50))).astype(np.float32)
    tokens = rng.integers(0, 50, (6, 9))
    made = {
        "top_k": found.TopKLogitsWarper(7),
        "top_p": found.TopPLogitsWarper(0.8),
        "min_p": found.MinPLogitsWarper(0.05),
        "typical_p": found.TypicalLogitsWarper(0.7),
        "repetition": found.RepetitionPenaltyLogitsProcessor(1.3),
    }
    arrays = {name: f(torch.tensor(tokens), torch.tensor(logits)).numpy() for name, f in made.items()}
    return {"sampler_logits": logits, "sampler_tokens": tokens.astype(np.int32), **arrays}


def main() -> None:
    """Renews the part of the file that the installed version can make."""
    path = GOLDEN / "generation_transformers.npz"
    arrays = dict(np.load(path)) if path.exists() else {}
    model = load()
    with np.load(GOLDEN / "hf_llama" / "expected.npz") as expected:
        prompt, mask = expected["left_tokens"], expected["left_mask"]
    arrays |= {"prompt": prompt, "prompt_mask": mask}
    if transformers.__version__.startswith("4."):
        calls = {
            "contrastive_4_0.6": {"penalty_alpha": 0.6, "top_k": 4},
            "contrastive_8_0.3": {"penalty_alpha": 0.3, "top_k": 8},
            "dola_0": {"dola_layers": [0]},
            "dola_1": {"dola_layers": [1]},
            "diverse": {
                "num_beams": 6,
                "num_beam_groups": 3,
                "diversity_penalty": 0.7,
                "num_return_sequences": 6,
                "eos_token_id": None,
            },
        }
    else:
        calls = {f"beam_{name}": options for name, options in BEAMS.items()}
        arrays |= processors()
    for name, options in calls.items():
        found = decode(model, prompt, mask, **options)
        arrays |= {name + suffix: array for suffix, array in found.items()}
        print(name, found[""].shape, "ends:", (found[""] == EOS).any(axis=1).sum())
    np.savez_compressed(path, allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
