"""Checkpoints that can be believed: atomic, asynchronous, hashed, restored bit for bit."""

from rlhf_jax.checkpoint.manager import CheckpointManager, restore_params
from rlhf_jax.checkpoint.manifest import Leaf, Manifest, read_manifest

__all__ = ["CheckpointManager", "Leaf", "Manifest", "read_manifest", "restore_params"]
