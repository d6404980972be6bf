"""Safetensors files as the storage of ``torch.distributed.checkpoint`` (DCP).

DCP's planner decides which rank writes or reads which chunk of which tensor. The classes here write the chunks to files, and
find and read them again. Loading unpickles nothing.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ..errors import CheckpointError
from ..storage.folders import sync
from ..storage.header import Spec
from ..storage.tensors import ShardWriter
from .folder import open_file
from .manifest import Checksums, Chunk, FileEntry, Manifest, TensorEntry

KINDS = ("model", "optimizer")
"""Kinds of tensors. A tensor is named KIND/NAME, and each rank writes one file per kind."""


class SafetensorsWriter(StorageWriter):
    """Writes this rank's chunks to ``KIND-RANK.safetensors``."""

    def __init__(
        self, folder: Path, rank: int, on_written: Callable[[dict[str, TensorEntry], dict[str, FileEntry]], None]
    ) -> None:
        """
        Args:
            folder: the folder that is written to.
            on_written: is called on the coordinator (rank 0) when all ranks have written, with the manifest's entries of all
                tensors and files.
        """
        self.folder, self.rank, self.on_written = folder, rank, on_written

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        self.folder.mkdir(parents=True, exist_ok=True)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's files, and waits until they are on disk: rank 0 may be on another host, and cannot do that."""
        by_kind: dict[str, list[WriteItem]] = defaultdict(list)
        for item in plan.items:
            by_kind[item.index.fqn.split("/")[0]].append(item)
        results: list[WriteResult] = []
        for kind, items in by_kind.items():
            results += self._write_file(f"{kind}-{self.rank:05d}.safetensors", items, planner)
        sync(self.folder)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_file(self, name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        tensors = {_key(item.index): _data(item, planner) for item in items}
        specs = {key: Spec(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
        nbytes, sums = sum(spec.nbytes for spec in specs.values()), Checksums()
        try:
            with ShardWriter(self.folder, specs, nbytes, lambda *_: name, lambda _, data: sums.update(data)) as writer:
                for tensor in tensors.values():
                    writer.add(tensor.cpu())
            sync(self.folder / name)
        except OSError as error:
            raise CheckpointError(f"{self.folder / name} cannot be written: {error.strerror or error}") from error
        entry = sums.entry()
        return [
            WriteResult(item.index, tensor.nbytes, (Chunk(name, key, list(item.index.offset or ()), list(tensor.shape)), entry))
            for item, (key, tensor) in zip(items, tensors.items(), strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        tensors, files = {}, {}
        for name, info in metadata.state_dict_metadata.items():
            assert isinstance(info, TensorStorageMetadata)
            tensors[name] = TensorEntry(str(info.properties.dtype).removeprefix("torch."), list(info.size), [])
        for result in itertools.chain.from_iterable(results):  # there may be a million
            chunk, files[chunk.file] = result.storage_data
            tensors[result.index.fqn].chunks.append(chunk)
        self.on_written(tensors, files)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def storage_meta(self) -> StorageMeta | None:
        return None


def _data(item: WriteItem, planner: SavePlanner) -> torch.Tensor:
    data = planner.resolve_data(item)
    assert isinstance(data, torch.Tensor), f"{item.index.fqn} is not a tensor"
    return data.detach()


def _key(index: MetadataIndex) -> str:
    """Returns the name of a chunk in its file: the tensor's name and the offsets of the chunk."""
    offset = ",".join(str(o) for o in index.offset or ())
    return f"{index.fqn.split('/', 1)[1]}@{offset}"


class SafetensorsReader(StorageReader):
    """Reads the chunks that the manifest lists."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        stored = {}
        for name, entry in self.manifest.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks]
            properties = TensorProperties(dtype=getattr(torch, entry.dtype))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
            stored.update({MetadataIndex(name, c.offsets): (c.file, c.key) for c in entry.chunks})
        return Metadata(state_dict_metadata=tensors, storage_data=stored)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.stored = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file = defaultdict(list)
        for request in plan.items:
            file, key = self.stored[request.storage_index]
            by_file[file].append((key, request))
        for name, requests in by_file.items():
            file = open_file(self.folder / name)
            for key, request in requests:
                file.read_box(key, request.storage_offsets, planner.resolve_tensor(request).detach())
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True
