"""Notes about a config that is valid, but may not do what its author expects. They are printed, and nothing stops."""

from __future__ import annotations

from collections.abc import Iterator

from .model import Model
from .option import notices
from .rope import is_number
from .schema import Config


def notes(config: Config, short: bool = False) -> list[str]:
    """Returns one line for each key without an effect, and for each two keys that together do something surprising.

    Args:
        short: as in ``notices``.
    """
    return [*notices(config, short), *_rows_beyond_the_model(config), *_two_lengths(config)]


def _rows_beyond_the_model(config: Config) -> Iterator[str]:
    """The original trains so, too. But other programs, and generation here, stop at what the exported config says."""
    length, longest = config.data.seq_len, _longest(config.model)
    if longest is not None and length > longest:
        yield (
            f"data.seq_len = {length} is longer than model.max_position_embeddings = {config.model.max_position_embeddings}: "
            "training uses whole rows, but the exported config.json has the smaller number, and generation, evaluation and "
            f"other programs refuse or cut longer texts; set model.max_position_embeddings={length}"
        )


def _longest(model: Model) -> int | None:
    """Returns the longest text for which the model's positions are made, as ``generate`` has it; None: there is no limit.

    The scaling may have mistakes, which are reported elsewhere.
    """
    scaling = model.rope_scaling or {}
    dynamic = model.use_dynamic_ntk_rope or model.rope_type == "dynamic_ntk"
    if model.use_alibi or dynamic or "dynamic" in (scaling.get("rope_type"), scaling.get("type")):
        return None
    original = scaling.get("original_max_position_embeddings") or model.max_position_embeddings
    factor = scaling.get("factor") or 1
    scaled = original * factor if is_number(original) and is_number(factor) else 0
    return max(model.max_position_embeddings, int(scaled))


def _two_lengths(config: Config) -> Iterator[str]:
    """A schedule may be longer than the run on purpose; or data.total_steps has been changed, and the other forgotten."""
    schedule, steps = config.lr_scheduler, config.data.total_steps
    uses = schedule.kind != "constant" or (schedule.warmup_ratio and schedule.warmup_steps is None)
    if uses and schedule.total_steps is not None and schedule.total_steps > steps:
        yield (
            f"lr_scheduler.total_steps = {schedule.total_steps}, but data.total_steps = {steps}: the learning rate follows a "
            f"schedule of {schedule.total_steps} steps, of which the run takes the first {steps}; leave out "
            "lr_scheduler.total_steps (or set it to None) for one that ends with the run"
        )
