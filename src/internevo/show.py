"""``internevo config``: the resolved config, and the layout it would have."""

from __future__ import annotations

import sys
from pathlib import Path

from .config.check import data_size, missing_features, missing_paths, problems
from .config.load import dump, load_config
from .config.option import notices
from .errors import ConfigError


def show(path: Path, overrides: list[str], world_size: int | None) -> None:
    """Prints the config on standard output; notes and warnings on standard error.

    Raises:
        ConfigError: when the config cannot be trained on ``world_size`` processes, missing files aside.
    """
    config = load_config(path, overrides)
    for line in notices(config):
        print(f"note: {line}", file=sys.stderr)
    for line in [*missing_paths(config), *missing_features(config)]:
        print(f"warning: {line}", file=sys.stderr)
    smallest = config.parallel.tensor.size * config.parallel.pipeline.size
    wrong = problems(config, world_size or max(smallest, config.parallel.weight.size, config.parallel.zero1.size * smallest))
    if wrong:
        raise ConfigError("the config cannot be trained:\n" + "\n".join(f"  {line}" for line in wrong))
    print(dump(config), end="")
    if world_size:
        from .data.batches import BatchSizes
        from .parallel.layout import Layout

        print(f"\nlayout on {world_size} processes")
        layout = Layout.of(config.parallel, world_size)
        for axis, size, meaning in layout.describe():
            print(f"  {axis:<10} {size:>6}  {meaning}")
        for axis, groups in layout.groups().items():
            print(f"  {axis:<10} groups  {_some([_ranks(group) for group in groups])}")
        sizes = BatchSizes.of(config.data, data_size(config, world_size))
        rows = sizes.rows(config.data.total_steps)
        print(
            f"  step       {rows:>6}  rows of {config.data.seq_len} tokens = {rows * config.data.seq_len:,} tokens "
            f"({sizes.micro_num} micro-batches of {sizes.micro_bsz} on each of {sizes.ranks} data ranks)"
        )


def _ranks(group: list[int]) -> str:
    """Ranks of a group: "0-7", "0,8,...,56"."""
    if len(group) > 1 and group[-1] - group[0] == len(group) - 1:
        return f"{group[0]}-{group[-1]}"
    return ",".join(map(str, group)) if len(group) <= 4 else f"{group[0]},{group[1]},...,{group[-1]}"


def _some(groups: list[str]) -> str:
    return "  ".join(groups if len(groups) <= 8 else [*groups[:4], "...", groups[-1]])
