"""Freezes low-rank adapters of `peft` and what its models compute with them: tests/golden/peft_*/.

The tests hold our reader and writer of PEFT folders against these, so that nobody needs PyTorch to run them.
To make them again (in an environment of its own):

    pip install torch==2.13.0 transformers peft safetensors
    python tools/goldens/make_goldens_peft.py
    # instead: what PEFT computes with adapters written by us
    python tools/goldens/make_goldens_peft.py FOLDER...

peft_{case}/adapter_config.json, adapter_model.safetensors   as `save_pretrained` writes them, on hf_llama
peft_{case}/expected.npz
  tokens [B, T] int, logits [B, T, V] float32

Both factors, and the magnitudes of DoRA, are moved off their initial values. A folder given by name holds
our adapter and its expected.npz; the largest distance of PEFT's logits from it is printed.
Made with peft 0.21.2, transformers 5.23.0 and PyTorch 2.13.0.
"""

import pathlib
import sys
from typing import Any

import numpy as np
import peft
import torch
import transformers

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden"
BASE = GOLDEN / "hf_llama"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": ALL, "use_rslora": True},
    "dora": {"r": 2, "lora_alpha": 4, "target_modules": ["o_proj", "down_proj"], "use_dora": True},
}


def base_model() -> Any:
    """The frozen checkpoint that the adapters stand on."""
    return transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """What a model says of whole rows."""
    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits.numpy()


def freeze(case: str, options: dict[str, Any]) -> None:
    """Makes the folder of one case."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base_model(), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.randn_like(parameter)
        elif "lora_" in name:
            parameter.data = 0.15 * torch.randn_like(parameter)
    folder = GOLDEN / f"peft_{case}"
    model.peft_config["default"].base_model_name_or_path = "hf_llama"
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 8))
    np.savez_compressed(folder / "expected.npz", tokens=tokens, logits=logits(model, tokens))


def check(folder: pathlib.Path) -> None:
    """Loads an adapter that we wrote and compares."""
    expected = np.load(folder / "expected.npz")
    model = peft.PeftModel.from_pretrained(base_model(), folder).eval()
    distance = np.abs(logits(model, expected["tokens"]) - expected["logits"]).max()
    print(f"{folder}: PEFT's logits are within {distance:.1e}")


def main() -> None:
    """All cases, or the folders on the command line."""
    for folder in sys.argv[1:]:
        check(pathlib.Path(folder))
    if len(sys.argv) == 1:
        for case, options in CASES.items():
            freeze(case, options)


if __name__ == "__main__":
    main()
