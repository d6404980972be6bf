"""What the ranks do when they save a checkpoint together."""

import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from internevo.checkpoint.manifest import NAME
from internevo.checkpoint.saver import Saver
from internevo.commands.train import train
from internevo.parallel import gloo
from internevo.parallel.shards import local
from internevo.parallel.world import World
from internevo.train.config import load_config
from internevo.train.parts import Parts
from tests.conftest import WriteConfig, tensors
from tests.parallel.layouts import COMMON, EXPERTS, layout
from tests.pool import Pool


def _saver(world: World, parts: Parts, stager: DefaultStager | None = None) -> Saver:
    config = parts.config
    return Saver(config.run_folder, config.ckpt, world.rank, {"world": world.size}, gloo.new_group(), stager=stager)


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


class _Recorded(DefaultStager):
    """Copies in a thread, as on a GPU, and records how many bytes."""

    def __init__(self, delay: float = 0.0) -> None:
        super().__init__(StagingOptions(False, False, use_async_staging=True, use_non_blocking_copy=False))
        self.delay, self.nbytes = delay, 0

    def _stage(self, state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        time.sleep(self.delay)
        self.nbytes = sum(local(tensor).nbytes for tensor in state_dict.values())
        return super()._stage(state_dict, **kwargs)


def _train_with_late_copies(path: Path) -> None:
    """Trains with copies that begin later than the next step takes."""
    with mock.patch("internevo.train.trainer.stager_for", return_value=_Recorded(delay=0.5)):
        train(path, [], None, launcher="torch")


def test_a_checkpoint_has_the_values_of_its_step_however_late_they_are_copied(
    pool: Pool, config: WriteConfig, tmp_path: Path
) -> None:
    """The next step computes meanwhile, and waits before it changes them. Each save copies into the same memory again."""
    processes, changes = layout(2)
    balanced = {**EXPERTS, "model__moe_type": "Dropless", "model__moe_layer_kwargs": {"bias_update_speed": 0.25}}
    changes = {**COMMON, **changes, **balanced, "data__total_steps": 3, "ckpt__checkpoint_every": 1}
    pool.train(config("at once", **changes), processes)
    pool.run_alone(_train_with_late_copies, processes, config("late", **changes))
    for step in (1, 2, 3):
        wanted, found = tensors(tmp_path / "at once", step), tensors(tmp_path / "late", step)
        assert wanted.keys() == found.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), (step, name)


def _save_and_count(world: World, path: Path) -> tuple[int, int]:
    """Saves a checkpoint. Returns how many bytes this rank has copied, and how many its tensors have."""
    parts, stager = Parts.build(load_config(path, []), world), _Recorded()
    saver = _saver(world, parts, stager)
    saver.save(1, parts.tensors(), parts.extras())
    saver.close()
    return stager.nbytes, sum(local(tensor).nbytes for tensor in parts.tensors().values())


@pytest.mark.parametrize("changes", [layout(4, zero=2), layout(4, "mtp", 2, zero=1), layout(4, zero=2, fsdp=True)])
def test_of_shards_with_replicas_each_rank_copies_its_share(
    pool: Pool, config: WriteConfig, tmp_path: Path, changes: Any
) -> None:
    processes, changes = changes
    ranks = pool.run(_save_and_count, processes, config("run", **COMMON, **changes))
    pool.run(_save_and_count, 1, config("one", **COMMON))
    wanted, found = tensors(tmp_path / "one", 1), tensors(tmp_path / "run", 1)
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert sum(copied for copied, _ in ranks) == pytest.approx(sum(t.nbytes for t in wanted.values()), rel=0.03)
    for copied, nbytes in ranks:
        assert copied == pytest.approx(nbytes / 2, rel=0.2), ranks
