"""The operating system may read fewer bytes than it was asked for."""

import ctypes
import errno
import os
import resource
import sys
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


class NoFallocate:
    """A C library whose file system cannot allocate in advance."""

    def fallocate(self, *arguments: object) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1


def test_a_file_grows_as_it_is_written_where_it_cannot_be_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: NoFallocate())
    monkeypatch.setattr(os, "posix_fallocate", None)  # it would write a byte into each page first
    wanted = torch.randn(50)
    with ShardWriter(tmp_path, {"a": Spec((50,), torch.float32)}, 10**9, lambda number, count: "a") as writer:
        writer.add(wanted)
    assert torch.equal(load_file(tmp_path / "a")["a"], wanted)


@pytest.mark.skipif(sys.platform != "linux", reason="allocates in advance on Linux only")
def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with (
            pytest.raises(OSError, match=f"File too large: '{tmp_path}/a'"),
            ShardWriter(tmp_path, {"a": Spec((50,), torch.float32)}, 10**9, lambda number, count: "a") as writer,
        ):
            writer.add(torch.randn(50))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a").stat().st_size == 0
