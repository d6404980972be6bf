"""What a run says about itself: the line that it begins with, and the facts in its report."""

from __future__ import annotations

from typing import Any

from ..models.decoder import parameter_shapes
from ..models.linear import ADAPTER_INFIX
from ..observe.facts import facts
from ..parallel.layout import Layout
from ..wording import counted
from .lr_schedule import describe
from .parts import Parts


def axis_sizes(layout: Layout) -> dict[str, int]:
    """Returns axis -> number of ranks."""
    return {axis: size for axis, size, _ in layout.describe()}


def facts_of(parts: Parts) -> dict[str, Any]:
    """Returns what the report says about a run."""
    decoder, model, world = parts.decoder, parts.config.model, parts.world
    axes = ", ".join(f"{axis} {size}" for axis, size in axis_sizes(parts.layout).items() if size > 1 and axis != "world")
    return {
        **facts(world.device),
        "processes": world.size,
        "layout": axes or "one process",
        "parameters": decoder.parameters(),
        "model": f"{decoder.summary()}, {counted(model.num_layers, 'layer')} of {model.hidden_size}, {model.dtype}",
        "learning rate": describe(parts.config),
    }


def title(parts: Parts, batch: int) -> str:
    """Returns the line about the model and the batches.

    Args:
        batch: the number of the next batch (the global batch may grow).
    """
    config, world = parts.config, parts.world
    shapes = parameter_shapes(parts.decoder)  # of all stages of a pipeline
    trained = sum(shape.numel() for name, shape in shapes.items() if ADAPTER_INFIX in name)
    adapters = f" and {trained:,} in adapters" if parts.decoder.lora else ""
    return (
        f"{config.JOB_NAME}: {parts.decoder.summary()}{adapters}, "
        f"{config.model.dtype}, on {world.size} x {world.device.type}; {counted(parts.sizes.rows(batch), 'row')} of "
        f"{config.data.seq_len} tokens per step; {config.run_folder}/"
    )
