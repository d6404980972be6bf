"""What the ranks do when they save a checkpoint together."""

import os
import time
from pathlib import Path
from unittest import mock

from internevo.checkpoint.manifest import NAME
from internevo.checkpoint.saver import Saver
from internevo.parallel import gloo
from internevo.parallel.world import World
from internevo.train.config import load_config
from internevo.train.parts import Parts
from tests.conftest import WriteConfig
from tests.parallel.layouts import COMMON, layout
from tests.pool import Pool


def _saver(world: World, parts: Parts) -> Saver:
    config = parts.config
    return Saver(config.run_folder, config.ckpt, world.rank, {"world": world.size}, gloo.new_group())


def _save_and_record(world: World, path: Path) -> list[tuple[float, str]]:
    """Saves a checkpoint. Returns when this rank has waited until a file or folder is on disk, and its name."""
    parts = Parts.build(load_config(path, []), world)
    found, original = [], os.fsync

    def fsync(descriptor: int) -> None:
        original(descriptor)
        found.append((time.monotonic(), Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))

    with mock.patch("os.fsync", fsync):
        saver = _saver(world, parts)
        saver.save(1, parts.tensors(), parts.extras())
        saver.wait()
    return found


def test_each_rank_has_its_own_files_on_disk_before_there_is_a_manifest(pool: Pool, config: WriteConfig) -> None:
    """On a network file system, no host can wait for what another one has written."""
    processes, changes = layout(2)
    ranks = pool.run(_save_and_record, processes, config("run", **COMMON, **changes))
    manifest = next(when for when, name in ranks[0] if name.startswith(f".{NAME}."))
    before = [[name for when, name in found if when < manifest] for found in ranks]
    for rank, names in enumerate(before):
        mine = {f"model-{rank:05d}.safetensors", f"optimizer-{rank:05d}.safetensors"}
        assert {name for name in names if name.endswith(".safetensors")} == mine
        assert names.index(".step-00000001.tmp") > max(map(names.index, mine)), "their names are on disk, too"
    assert {"state.json", "model.json", "config.json"} <= set(before[0])
    assert ".step-00000001.tmp" in [name for when, name in ranks[0] if when > manifest], "the manifest's name is on disk"
