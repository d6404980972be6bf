"""gloo groups: each has one thread, and many collectives may end at the same time in one group."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from internevo.parallel import gloo
from internevo.parallel.world import World
from internevo.text.tokenizer import train_bpe
from internevo.train.config import load_config
from internevo.train.stop import StopRequests
from internevo.train.trainer import Trainer
from internevo.train.watchdog import Watchdog
from tests.conftest import write_config
from tests.pool import Pool


def gather_often(world: World) -> int:
    group = dist.group.WORLD
    assert group is not None
    x = torch.full((8,), float(world.rank))
    for _ in range(600):
        started = [functional.all_gather_single(x + number, 0, group) for number in range(8)]
        for number, gathered in enumerate(started):
            assert gathered.tolist() == [number] * 8 + [number + 1.0] * 8
    return world.rank


def test_many_gathers_at_once_do_not_damage_the_heap(pool: Pool) -> None:
    """With two threads per group, which is PyTorch's default, a process died in two of three runs."""
    assert pool.run(gather_often, 2, device="cpu") == [0, 1]


def threads_of_groups() -> list[int]:
    """Returns the number of threads of every gloo group of this process."""
    groups = list(dist.distributed_c10d._world.pg_map)
    backends = {group._get_backend(device) for group in groups for device in group._device_types}
    made: list[Any] = [backend for backend in backends if isinstance(backend, dist.ProcessGroupGloo)]
    return [backend.options._threads for backend in made]


def train_and_count(world: World, path: Path) -> list[int]:
    with Watchdog(world, 0) as watchdog:
        Trainer(load_config(path, []), world, StopRequests(), watchdog).fit()
    return threads_of_groups()


def test_every_group_of_a_run_has_one_thread(pool: Pool, tmp_path: Path) -> None:
    """Groups of training, of each stream and of the saver."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.jsonl").write_text("\n".join(json.dumps({"text": "the cat sat " * 9}) for _ in range(40)))
    tokenizer = train_bpe(["the cat sat"] * 3, 300, tmp_path / "tokenizer")
    path = write_config(
        tmp_path, texts, data__type="streaming", data__tokenizer_path=str(tokenizer), data__num_worker=0, model__vocab_size=300,
        data__total_steps=2, parallel__zero1=2, ckpt__checkpoint_every=1,
    )  # fmt: skip
    # Groups of the world, of the zero axis, of the replicate axis, of axes with a single rank, of the saver, and of the stream.
    assert [sorted(threads) for threads in pool.run(train_and_count, 4, path, device="cpu")] == [[1] * 6] * 4


def threads_with_a_group_of_pytorch(world: World) -> list[int]:
    dist.new_group(backend="gloo")
    gloo.new_group()
    return sorted(threads_of_groups())


def test_a_group_with_two_threads_would_be_found(pool: Pool) -> None:
    """PyTorch's own gloo group has two threads."""
    assert pool.run(threads_with_a_group_of_pytorch, 1, device="cpu") == [[1, 1, 2]]
