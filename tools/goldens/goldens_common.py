"""What the makers of golden files share: stand-ins for a trainer, and the file format."""

import json
import pathlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden"
Arrays = dict[str, Any]


def accelerator() -> SimpleNamespace:
    """One process: gathering and reducing do nothing."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        sync_gradients=True,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, dim, pad_index: x,
    )


def trainer(**settings: Any) -> SimpleNamespace:
    """What the loss methods read of `self`, in evaluation mode (no scaling for accumulation)."""
    return SimpleNamespace(
        accelerator=accelerator(),
        aux_loss_enabled=False,
        model=SimpleNamespace(training=False),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _tp_size=1,
        _total_train_tokens=0,
        **settings,
    )


def save(name: str, inputs: Arrays, runs: dict[str, Arrays], **described: Any) -> None:
    """Writes one file; `described` becomes JSON."""
    arrays = dict(inputs)
    for case, outputs in runs.items():
        for key, value in outputs.items():
            arrays[f"{case}/{key}"] = value.detach() if isinstance(value, torch.Tensor) else value
    arrays |= {key: json.dumps(value) for key, value in described.items()}
    GOLDEN.mkdir(exist_ok=True)
    np.savez_compressed(
        GOLDEN / f"{name}.npz",
        allow_pickle=False,
        **{key: np.asarray(value) for key, value in arrays.items()},
    )
    print(f"{name}: {len(arrays)} arrays")
