"""Checkpoints: safetensors and JSON files that do not depend on the layout. A checkpoint is complete if it has a manifest."""

from .folder import Checkpoint, complete_checkpoints, find_checkpoint

__all__ = ["Checkpoint", "complete_checkpoints", "find_checkpoint"]
