"""Each rank reads from a checkpoint of any layout only what it needs, a few rows at a time; and so does convert."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from internevo.checkpoint import Checkpoint
from internevo.checkpoint.saver import Saver
from internevo.commands.convert import convert
from internevo.config.run import LoadCkptInfo
from internevo.parallel import gloo
from internevo.parallel.shards import local
from internevo.parallel.world import World
from internevo.storage import header, tensors
from internevo.train.config import load_config
from internevo.train.parts import Parts
from internevo.train.restore import load_checkpoint
from tests.conftest import WriteConfig
from tests.parallel.layouts import COMMON, EXPERTS, layout, pipelined
from tests.pool import Pool

CHUNK = 256
"""Bytes that are read at once, so that small tensors need several reads."""
LAYOUTS = {
    "one process": layout(1),
    "pipeline": pipelined(2, 2, layers=2),
    "mtp": layout(2, "mtp", 2),
    "zero": layout(2),
    "fsdp": layout(2, fsdp=True),
    "isp": layout(2, "isp", 2, 2),
    "msp and zero": layout(4, "msp", 2),
    "experts": layout(2, parallel__expert={"size": 2}),
}
DENSE = [("pipeline", "mtp"), ("zero", "isp"), ("one process", "msp and zero"), ("isp", "pipeline"), ("mtp", "one process")]
SPARSE = [("experts", "one process"), ("one process", "experts"), ("experts", "fsdp")]
OF_EXPERTS = {**EXPERTS, "model__num_shared_experts": 1}


@contextmanager
def _reads() -> Iterator[list[int]]:
    """A context in which chunks are small: the sizes of what is read from the tensors of safetensors files."""
    found: list[int] = []
    original, size = tensors._read_into, header.CHUNK_BYTES

    def read(data: memoryview, path: Path, descriptor: int, offset: int) -> None:
        if offset > 8:  # before it are the length of the header, and the header
            found.append(len(data))
        original(data, path, descriptor, offset)

    tensors._read_into, header.CHUNK_BYTES = read, CHUNK
    try:
        yield found
    finally:
        tensors._read_into, header.CHUNK_BYTES = original, size


def _save(world: World, path: Path) -> None:
    """Saves a checkpoint of initial weights, which are the same in every layout."""
    config = load_config(path, [])
    parts = Parts.build(config, world)
    saver = Saver(config.run_folder, config.ckpt, world.rank, {"world": world.size}, gloo.new_group(), lambda folder: None, "")
    saver.save(1, parts.tensors(), parts.extras())
    saver.wait()


def _load(world: World, path: Path, checkpoint: Path) -> tuple[int, int, int]:
    """Returns how many bytes this rank has read, at most at once, and how many its tensors have."""
    parts = Parts.build(load_config(path, []), world)
    wanted = LoadCkptInfo(path=str(checkpoint), content=("model", "optimizer", "scheduler"))
    with _reads() as reads:
        load_checkpoint(parts, Checkpoint(checkpoint), wanted)
    return sum(reads), max(reads), sum(local(tensor).nbytes for tensor in parts.tensors().values())


def _write(config: WriteConfig, name: str, label: str, model: dict[str, Any]) -> tuple[Path, int]:
    processes, changes = LAYOUTS[name]
    return config(label, **{**COMMON, **model, **changes}), processes


@pytest.mark.parametrize(("saved", "loaded"), DENSE + SPARSE)
def test_a_rank_reads_only_its_part(pool: Pool, config: WriteConfig, tmp_path: Path, saved: str, loaded: str) -> None:
    model = OF_EXPERTS if (saved, loaded) in SPARSE else {}
    path, processes = _write(config, saved, "saved", model)
    pool.run(_save, processes, path)
    path, processes = _write(config, loaded, "loaded", model)
    for read, at_once, needed in pool.run(_load, processes, path, tmp_path / "saved" / "checkpoints" / "step-00000001"):
        assert read == needed
        assert at_once <= max(CHUNK, 4 * 104)  # a row of the widest tensor may be longer


@pytest.mark.parametrize(
    ("names", "model"),
    [(["one process", "pipeline", "isp", "fsdp", "msp and zero"], {}), (["one process", "experts", "pipeline"], OF_EXPERTS)],
    ids=["dense", "experts"],
)
def test_conversion_gives_the_same_bytes_from_every_layout(
    pool: Pool, config: WriteConfig, tmp_path: Path, names: list[str], model: dict[str, Any]
) -> None:
    found = {}
    for number, name in enumerate(names):
        path, processes = _write(config, name, f"run{number}", model)
        pool.run(_save, processes, path)
        with _reads() as reads:
            convert(tmp_path / f"run{number}", tmp_path / f"hf{number}", "hf")
        assert max(reads, default=0) <= max(CHUNK, 4 * 104), "a few rows at a time"
        found[name] = {file: (tmp_path / f"hf{number}" / file).read_bytes() for file in os.listdir(tmp_path / f"hf{number}")}
    assert "model.safetensors" in found["one process"]
    for name in names:
        assert found[name] == found["one process"], name
