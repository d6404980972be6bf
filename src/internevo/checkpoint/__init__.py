"""Checkpoints: safetensors and JSON, independent of the layout, complete if and only if the manifest is there."""

from .folder import Checkpoint, complete_checkpoints, find_checkpoint

__all__ = ["Checkpoint", "complete_checkpoints", "find_checkpoint"]
