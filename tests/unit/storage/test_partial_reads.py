"""The operating system may read fewer bytes than it was asked for."""

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from internevo.errors import UsageError
from internevo.storage.header import Spec
from internevo.storage.tensors import ShardWriter, TensorFile


@pytest.fixture
def short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read returns at most 7 bytes, and the operating system copies no file."""
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda file, count, offset: pread(file, min(count, 7), offset))
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:7]], offset))
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)


def test_tensors_are_read_and_copied_in_full(tmp_path: Path, short_reads: None) -> None:
    wanted = {"a": torch.randn(5, 3), "b": torch.randn(11).bfloat16()}
    save_file(wanted, tmp_path / "in.safetensors")
    file = TensorFile(tmp_path / "in.safetensors")
    assert torch.equal(file.read("a", 1, 3), wanted["a"][1:4])
    assert bytes(file.byte_range("a", 1, 3).read()) == wanted["a"][1:4].numpy().tobytes()
    with ShardWriter(tmp_path, file.specs, 10**9, lambda number, count: "out.safetensors") as writer:
        for name, spec in file.specs.items():
            writer.copy(file.byte_range(name, 0, spec.rows))
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_the_error_names_a_file_that_ends_inside_a_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.randn(50)}, tmp_path / "in.safetensors")
    file = TensorFile(tmp_path / "in.safetensors")
    rows = file.byte_range("a", 0, 50)
    os.truncate(tmp_path / "in.safetensors", rows.offset + 10)
    with pytest.raises(UsageError, match=rf"in.safetensors ends at byte {rows.offset + 10}"):
        rows.read()


def test_an_error_of_the_caller_stops_the_writers_thread(tmp_path: Path) -> None:
    def fail() -> None:
        specs = {"a": Spec((50,), torch.float32)}
        with ShardWriter(tmp_path, specs, 10**9, lambda number, count: "out.safetensors") as writer:
            writer.add(torch.randn(5))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "writer" not in [thread.name for thread in threading.enumerate()]
