"""Freezes small random checkpoints of models with vision and what `transformers` computes with them:
tests/golden/vision_*/.

    pip install torch==2.13.0 transformers safetensors
    python tools/goldens/make_goldens_vision.py

vision_{case}/config.json, model.safetensors   as `save_pretrained` writes them, float32
vision_{case}/expected.npz
  images [B, N, H, W, 3] uint8, present [B, N] bool: which of them are there
  tokens [B, T] int, mask [B, T] bool; the second row is padded on the left
  logits [B, T, V] float32
  greedy [B, 8] int: the most likely continuation

Made with transformers 5.24.0 and PyTorch 2.13.0.
"""

import pathlib
from typing import Any

import numpy as np
import torch
import transformers

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden"
VOCAB, IMAGE, NEW = 64, 63, 8
TEXT = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 50_000.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 4,
}
PER_IMAGE = (VISION["image_size"] // VISION["patch_size"] // 2) ** 2


def build(family: str, seed: int) -> Any:
    """A model whose parts all matter: unit scale, and vectors off their initial values."""
    config = getattr(transformers, f"{family}Config")(
        text_config=TEXT, vision_config=VISION, image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn_like(weight))
            else:
                fan_in = weight[0].numel()
                weight.normal_(std=0.5 if "embed" in name and weight.ndim == 2 else fan_in**-0.5)
    return model.eval()


def rows() -> dict[str, np.ndarray]:
    """Two rows: one with two images, one with one, after padding."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 2, 16, 16, 3), np.uint8)
    text = iter(rng.integers(3, IMAGE, 40).tolist())
    picture = [IMAGE] * PER_IMAGE
    first = [next(text), *picture, next(text), *picture, next(text), next(text)]
    second = [next(text), *picture, next(text), next(text)]
    missing = len(first) - len(second)
    tokens = np.array([first, [0] * missing + second], np.int32)
    mask = np.ones(tokens.shape, bool)
    mask[1, :missing] = False
    return {
        "images": images,
        "present": np.array([[True, True], [True, False]]),
        "tokens": tokens,
        "mask": mask,
    }


@torch.no_grad()
def logits_of(model: Any, data: dict[str, np.ndarray]) -> np.ndarray:
    """Logits [B, T, V]; an image that is missing is all zeros, which transformers leaves out."""
    pixels = (data["images"].astype(np.float32) / 255 - 0.5) / 0.5
    pixels = np.where(data["present"][..., None, None, None], pixels, 0).transpose(0, 1, 4, 2, 3)
    mask = torch.tensor(data["mask"], dtype=torch.long)
    inputs = {
        "input_ids": torch.tensor(data["tokens"], dtype=torch.long),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "pixel_values": torch.tensor(pixels.copy()),
        "pixel_attention_mask": torch.ones(pixels.shape[:2] + pixels.shape[3:], dtype=torch.bool),
        "use_cache": False,
    }
    return model(**inputs).logits.float().numpy()


def greedy_of(model: Any, data: dict[str, np.ndarray]) -> np.ndarray | None:
    """The most likely tokens, by whole passes; None where rounding could change them or one is an image."""
    for _ in range(NEW):
        last = logits_of(model, data)[:, -1]
        best = np.sort(last, axis=-1)
        chosen = last.argmax(-1).astype(np.int32)
        if (best[:, -1] - best[:, -2]).min() < 1e-3 or (chosen == IMAGE).any():
            return None
        data = data | {
            "tokens": np.concatenate([data["tokens"], chosen[:, None]], axis=1),
            "mask": np.concatenate([data["mask"], np.ones((2, 1), bool)], axis=1),
        }
    return data["tokens"][:, -NEW:]


def make(family: str) -> None:
    """Makes one folder, with the first seed that serves."""
    folder, data = GOLDEN / f"vision_{family.lower()}", rows()
    for seed in range(100):
        model = build(family, seed)
        greedy = greedy_of(model, data)
        if greedy is None:
            continue
        arrays = {**data, "logits": logits_of(model, data), "greedy": greedy}
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(folder / "expected.npz", allow_pickle=False, **arrays)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{family}: {size / 1024:.0f} KiB, seed {seed}, deviation {arrays['logits'].std():.2f}")
        return
    raise SystemExit(f"{family}: no seed of 100 gives a clear greedy path")


if __name__ == "__main__":
    for name in ("Idefics3", "SmolVLM"):
        make(name)
