"""A step leaves no tensors for Python's garbage collector, which the loop runs only every few steps; a run leaves no groups."""

import gc
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from internevo.commands.train import train
from internevo.parallel.world import World
from internevo.train.check import check
from internevo.train.config import load_config
from internevo.train.stop import StopRequests
from internevo.train.trainer import Trainer
from internevo.train.watchdog import Watchdog
from tests.conftest import write_config, write_dataset
from tests.pool import Pool


def tensors_in_cycles(world: World, path: Path) -> list[str]:
    """Returns the shapes of the tensors that only the garbage collector can free after the third step of a run."""
    config = load_config(path, [])
    check(config, world.size)
    with Watchdog(world, 0) as watchdog:
        trainer = Trainer(config, world, StopRequests(), watchdog)
        batches = trainer.batches.prefetch(trainer.state.cursor)
        try:
            for _ in range(2):
                trainer._step(next(batches), 0.0)
            while gc.collect():  # what earlier jobs of this process have left: freeing an object may make another one free
                pass
            gc.disable()
            trainer._step(next(batches), 0.0)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            return [f"{type(found).__name__} {list(found.shape)}" for found in gc.garbage if isinstance(found, torch.Tensor)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()


KINDS: dict[str, dict[str, Any]] = {
    "zero": {},
    "fsdp": {"parallel__zero1": {"size": -1, "fsdp": True}},
    "msp, recomputed": {"parallel__tensor": {"size": 2, "mode": "msp"}, "model__vocab_size": 98, "model__checkpoint": True},
    "isp": {
        "parallel__tensor": {"size": 2, "mode": "isp"}, "parallel__weight": {"size": 2, "overlap": True},
        "model__vocab_size": 98,
    },
    "experts": {
        "model_type": "QWEN2MOE", "model__num_experts": 5, "model__top_k": 2, "model__num_shared_experts": 2,
        "model__moe_intermediate_size": 20,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_leaves_no_tensor_in_a_reference_cycle(pool: Pool, tmp_path: Path, kind: str) -> None:
    """Its memory would be kept until the next collection, many steps later."""
    path = write_config(tmp_path, write_dataset(tmp_path / "data"), **KINDS[kind])
    assert pool.run(tensors_in_cycles, 2, path) == [[], []]


def meshes() -> list[DeviceMesh]:
    """The meshes that there are. Each has its process groups, and each of those two threads."""
    while gc.collect():  # freeing an object may make another one free
        pass
    return [found for found in gc.get_objects() if isinstance(found, DeviceMesh)]


def meshes_of_a_run(path: Path) -> int:
    """Trains, and returns how many meshes are left of it."""
    before = meshes()
    train(path, [], None, launcher="torch")
    end = time.monotonic() + 30
    while (left := len(meshes()) - len(before)) and time.monotonic() < end:  # a thread that ends may hold one a moment longer
        time.sleep(0.1)
    return left


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_run_leaves_no_process_groups(pool: Pool, tmp_path: Path, fsdp: bool) -> None:
    changes: dict[str, Any] = {
        "model_type": "INTERNLM2", "model__tie_word_embeddings": fsdp, "model__vocab_size": 98, "data__total_steps": 2,
        "parallel__tensor": {"size": 2, "mode": "mtp"}, "parallel__zero1": {"size": -1, "fsdp": fsdp},
    }  # fmt: skip
    path = write_config(tmp_path, write_dataset(tmp_path / "data"), **changes)
    assert pool.run_alone(meshes_of_a_run, 4, path) == [0] * 4
