"""``internevo config``: prints the resolved config, and the layout on a given number of processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.axes import data_size, smallest_world
from ..config.check import missing_paths
from ..config.load import dump, flat
from ..config.notes import notes
from ..config.option import walk
from ..config.schema import Config
from ..errors import ConfigError
from ..models.families.registry import decoder_config
from ..train.check import check_data, missing_features, problems
from ..train.config import load_config, with_tokenizer
from ..train.lr_schedule import describe
from ..train.resume import Recorded
from ..wording import counted, plural
from .printing import wrapped

if TYPE_CHECKING:  # these import PyTorch, which takes seconds and is only needed for a layout
    from ..models.config import DecoderConfig
    from ..parallel.layout import Layout
    from ..parallel.memory import Memory
    from ..parallel.strategy import Collectives


def show(path: Path, overrides: list[str], world_size: int | None, per_node: int = 8, everything: bool | None = None) -> None:
    """Prints the config on standard output, and notes and warnings on standard error.

    Args:
        path, overrides: the config file, and KEY.PATH=VALUE overrides.
        world_size: if it is given, the layout on this many processes is printed before.
        per_node: number of processes on each node.
        everything: print the whole config as JSON, rather than the model and what differs from the defaults; None: if standard
            output is no terminal, since scripts read it.

    Raises:
        ConfigError: if the config cannot be trained on ``world_size`` processes. Missing files are only warnings.
        DataError: if the tokenized data has ids outside the model's vocabulary, or cannot be read.
    """
    config = load_config(path, overrides)
    for line in notes(config):
        print(f"note: {line}", file=sys.stderr)
    record = Recorded.of(config)
    kept = record.tokenizer(config.data.tokenizer_path) if record and config.data.tokenizer_path else None
    opened = with_tokenizer(config, str(kept)) if kept else config
    for line in [*missing_paths(opened, new=record is None), *missing_features(config)]:
        print(f"warning: {line}", file=sys.stderr)
    wrong = problems(opened, world_size or smallest_world(config))
    if wrong:
        raise ConfigError("the config cannot be trained:\n" + "\n".join(f"  {line}" for line in wrong))
    check_data(config)
    everything = not sys.stdout.isatty() if everything is None else everything
    print(model_line(config), file=sys.stderr if everything else sys.stdout)
    print(f"  learning rate: {describe(config)}", file=sys.stderr if everything else sys.stdout)
    if world_size:
        print("\n".join(wrapped(line, 22) for line in layout_lines(config, world_size, per_node)) + "\n")
    if everything:
        print(dump(config), end="")
        return
    if not world_size:
        print(f"  --world-size N prints how N processes share the work; the smallest N is {smallest_world(config)}\n")
    print("what differs from the defaults (--all prints everything):")
    for key, value in differences(config).items():
        print(f"  {key} = {json.dumps(value, ensure_ascii=False)}")


def model_line(config: Config) -> str:
    """Describes the model: its family, the number of its parameters, and its size."""
    decoder, model = decoder_config(config.model_type, config.model), config.model
    return f"{config.JOB_NAME}: {decoder.summary()}; {counted(model.num_layers, 'layer')} of {model.hidden_size}, {model.dtype}"


def differences(config: Config) -> dict[str, Any]:
    """Returns key -> value, as in JSON, of every option whose value is not the default."""
    values = flat(config)
    return {key: values[key] for key, field, value, _ in walk(config) if value != field.get_default(call_default_factory=True)}


def layout_lines(config: Config, world_size: int, per_node: int) -> list[str]:
    """Returns lines with the size and the groups of every axis, the groups of every rank, the rows, the memory and the
    collectives of a step."""
    from ..data.batches import BatchSizes
    from ..parallel import plan
    from ..parallel.layout import Layout
    from ..parallel.strategy import Workload

    layout, decoder = Layout.from_config(config, world_size), decoder_config(config.model_type, config.model)
    lines = [f"layout on {counted(world_size, 'process')}"]
    axes = [row for row in layout.describe() if row[0] != "weight" or layout.mode == "isp"]
    groups = layout.groups()
    if not decoder.tie_embeddings:
        groups.pop("first and last", None)  # made for the shared embedding only
    width = max(11, *(len(axis) for axis in [*groups, *(axis for axis, _, _ in axes)]))
    lines += [f"  {axis:<{width}} {size:>6}  {meaning}" for axis, size, meaning in axes]
    lines += [f"  {axis:<{width}} groups  {_some([_ranks(group) for group in of])}" for axis, of in groups.items()]
    if groups:
        lines += _rank_table(groups, world_size, per_node)
    sizes = BatchSizes.from_config(config.data, data_size(config, world_size))
    last = config.data.total_steps - 1
    rows, micro_batches = sizes.rows(last), sizes.micro_batches(last)
    micro = counted(micro_batches, "micro-batch")
    if sizes.rampup_steps:
        in_rows = [sizes.rows(0), sizes.rows(sizes.rampup_steps) - sizes.rows(0)]
        every = counted(sizes.rampup_steps, "step")
        lines.append(f"  first step  {in_rows[0]:>6}  {plural(in_rows[0], 'row')}; {in_rows[1]} more every {every}")
    lines.append(
        f"  {'last step' if sizes.rampup_steps else 'step':<11} {rows:>6}  {plural(rows, 'row')} of "
        f"{config.data.seq_len} tokens = {rows * config.data.seq_len:,} tokens ({micro} of {sizes.micro_bsz} on "
        f"{f'each of {sizes.data_ranks} data ranks' if sizes.data_ranks > 1 else 'one data rank'})"
    )
    if layout.pipeline > 1:
        lines += _pipeline_lines(config, decoder, layout, micro_batches)
    if decoder.lora is not None:
        return [*lines, "  memory and collectives are not known for model.lora"]
    # The first rank of each stage; their shards are the largest.
    works = [
        Workload.from_config(decoder, config, layout, micro_batches, "cuda", rank) for rank in layout.weights.groups("stage")[0]
    ]
    memory = _memory_lines(plan.memory(works[0])) if len(works) == 1 else _memory_table([plan.memory(w) for w in works])
    return [*lines, *memory, *_traffic_lines(plan.traffic(works[0]), layout)]


def _pipeline_lines(config: Config, decoder: DecoderConfig, layout: Layout, micro_batches: int) -> Iterator[str]:
    """Formats the stages, with their shares of the time and of the parameters, and the idle time of the schedule."""
    from ..models.decoder import parameter_shapes
    from ..parallel import orders
    from ..parallel.stages import costs, split

    stages = split(decoder, layout.stages, config.data.seq_len, config.parallel.pipeline.layers)
    flops = costs(decoder, stages, config.data.seq_len)
    sizes = {name: shape.numel() for name, shape in parameter_shapes(decoder).items()}
    yield f"  {'stage':>7}{'rank':>6}  {'layers':<10}{'with':<12}{'time':>8}{'parameters':>12}"
    for number, (stage, share) in enumerate(zip(stages, flops, strict=True)):
        parameters = sum(size for name, size in sizes.items() if stage.has(name)) / sum(sizes.values())
        ends = " ".join(["embedding"] * stage.embeds + ["head"] * stage.heads)
        layers = f"{stage.layers[0]}-{stage.layers[-1]}" if len(stage.layers) > 1 else str(stage.layers[0])
        rank = layout.rank_of_stage(number)
        yield f"  {number:>7}{rank:>6}  {layers:<10}{ends:<12}{share / sum(flops):>8.1%}{parameters:>12.1%}"
    all_orders = orders.orders(layout.schedule, layout.pipeline, layout.chunks, micro_batches)
    times = {"F": 1.0, "B": 2.0 if layout.schedule == "1F1B" else 1.0, "W": 1.0}
    idle = orders.bubble(orders.play(all_orders, lambda action: times[action.kind] * flops[action.stage]))
    kept = max(orders.most_in_flight(order) for order in all_orders)
    micro = counted(micro_batches, "micro-batch")
    yield (
        f"  bubble      {idle:>6.1%}  of the time of a rank, with {micro}, if backward passes take\n"
        "                      twice as long as forward passes, and messages no time\n"
        f"                      at most {counted(kept, 'pass')} in flight on a rank"
    )


def _memory_lines(memory: Memory) -> Iterator[str]:
    unit, size = _unit(memory.total, GiB=2**30, MiB=2**20)
    parts = ", ".join(f"{name} {getattr(memory, field) / size:.2f}" for field, name in memory.NAMES.items())
    yield f"  memory      {memory.total / size:>6.2f}  {unit} on rank 0, without temporary buffers: {parts}"


def _memory_table(memories: list[Memory]) -> Iterator[str]:
    """Formats the memory of the ranks of a pipeline as a table."""
    parts = {**memories[0].NAMES, "total": "total"}
    unit, size = _unit(max(memory.total for memory in memories), GiB=2**30, MiB=2**20)
    yield f"  {unit:>7}{'rank':>6}" + "".join(f"  {name:>7}" for name in parts.values()) + "  most after the"
    for rank, memory in enumerate(memories):
        numbers = "".join(f"  {getattr(memory, part) / size:>{max(7, len(name))}.2f}" for part, name in parts.items())
        kind, stage, micro_batch = memory.after
        after = f"{'forward' if kind == 'F' else 'backward'} pass of micro-batch {micro_batch} through stage {stage}"
        yield f"  {'':>7}{rank:>6}{numbers}  {after}"
    yield f"  {'':13}  without temporary buffers"


def _traffic_lines(rows: list[Collectives], layout: Layout) -> Iterator[str]:
    """Formats the collectives of a step as a table. "on the wire" is what a rank sends."""
    if not rows:
        return
    title = "collectives of a step" if layout.pipeline == 1 else "collectives of rank 0"
    unit, size = _unit(max(row.nbytes for row in rows), GB=1e9, MB=1e6)
    width = max(12, *(len(row.axis) + 2 for row in rows))
    yield f"  {title:22}{'group':>{width}}{'ranks':>7}{'count':>7}{unit:>11}{f'{unit} on the wire':>16}"
    sizes = layout.sizes()
    for row in rows:
        ranks = sizes.get(row.axis, layout.world)
        sent = row.wire(ranks) / size
        yield f"  {row.kind:22}{row.axis:>{width}}{ranks:>7}{row.count:>7}{row.nbytes / size:>11.3f}{sent:>16.3f}"
    yield "  and one small all-reduce over all ranks, of the losses, token counts, gradient norm and requests to stop"


def _rank_table(groups: dict[str, list[list[int]]], world_size: int, per_node: int) -> list[str]:
    """Formats a table of all ranks (or of some, if there are many): the node of each, and its group of every axis."""
    number = {(axis, rank): n for axis, of in groups.items() for n, group in enumerate(of) for rank in group}
    shown = [*range(world_size)] if world_size <= 32 else [*range(24), *range(world_size - 4, world_size)]
    widths = {axis: max(12, len(axis) + 2) for axis in groups}
    lines = ["  rank   node" + "".join(f"{axis:>{width}}" for axis, width in widths.items()) + "   (numbers of groups)"]
    for before, rank in zip([-1, *shown], shown, strict=False):
        if rank != before + 1:
            lines.append("  ...")
        # Only the ranks of the first and the last stage are in a group of those.
        numbers = "".join(f"{number.get((axis, rank), '-'):>{width}}" for axis, width in widths.items())
        lines.append(f"  {rank:<6} {rank // per_node:<4}{numbers}")
    return lines


def _unit(most: float, **units: float) -> tuple[str, float]:
    """Returns the first unit, from large to small, that the largest number has one of (or the last), and its bytes."""
    return next((unit for unit in units.items() if most >= unit[1]), [*units.items()][-1])


def _ranks(group: list[int]) -> str:
    """Formats the ranks of a group: "0-7", or "0,8,...,56"."""
    if len(group) > 1 and group[-1] - group[0] == len(group) - 1:
        return f"{group[0]}-{group[-1]}"
    return ",".join(map(str, group)) if len(group) <= 4 else f"{group[0]},{group[1]},...,{group[-1]}"


def _some(groups: list[str]) -> str:
    return "  ".join(groups if len(groups) <= 8 else [*groups[:4], "...", groups[-1]])
