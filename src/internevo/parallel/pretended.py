"""One rank of a pretended world: its collectives do nothing, and its tensors have shapes and no memory.

The process groups are PyTorch's fake ones. Tensors are fake from the moment at which a module leaves the meta
device; all before that (meshes, process groups, how the strategies shard weights) is done as in a real run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore

from ..ops.dispatch import PLAIN, FakeTensor, FakeTensorMode, QuickMode, TorchDispatchMode, tree_leaves, unset_fake_temporarily
from .world import World


@contextmanager
def pretend(rank: int, size: int) -> Iterator[World]:
    """Makes this process the rank ``rank`` of a world of ``size`` ranks, the others of which do not exist, on CPUs."""
    store = FakeStore()
    dist.init_process_group("fake", rank=rank, world_size=size, store=store)
    try:
        yield World(rank, size, 0, torch.device("cpu"), store)
    finally:
        dist.destroy_process_group()


class NoMemory:
    """Tensors without memory, of which operators compute only the shapes."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def building(self) -> AbstractContextManager[Any]:
        """A context in which weights are without memory. Meshes compute with the numbers of ranks, which exist."""
        return _Weights(self.mode)

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which all new tensors are without memory, if they are not computed from existing ones alone, such as the
        borders of documents, which the host reads."""
        lock = ShardingPropagator._fake_mode_lock
        ShardingPropagator._fake_mode_lock = cast(Any, _Apart())
        try:
            with self.mode, _Existing():
                yield
        finally:
            ShardingPropagator._fake_mode_lock = lock


class _Apart:
    """A context in which a DTensor computes shapes: with tensors of whole weights, which must not count as this rank's. They
    are of another mode than the rank's tensors."""

    def __enter__(self) -> None:
        self._unset = unset_fake_temporarily()
        self._unset.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._unset.__exit__(*error)


class _Weights(TorchDispatchMode):
    """Makes what leaves the meta device a tensor without memory."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not PLAIN.issuperset(types):
            return NotImplemented  # a DTensor comes back with its shard
        device = kwargs.get("device")
        if func is not torch.ops.aten.empty_like.default or device is None or not args[0].is_meta:
            return func(*args, **kwargs)
        with self.fake:
            dtype = kwargs.get("dtype") or args[0].dtype
            return torch.empty_strided(args[0].shape, args[0].stride(), dtype=dtype, device=device)


class _Existing(QuickMode):
    """Computes operators on tensors that exist. It must be entered inside a ``FakeTensorMode``, which does all others."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and type(args[0]) is FakeTensor:
            return args[0].fake_device  # most calls are such ones
        if not PLAIN.issuperset(types):
            return NotImplemented
        tensors = () if FakeTensor in types else [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        with unset_fake_temporarily() if tensors and not tensors[0].is_meta else nullcontext():
            return func(*args, **(kwargs or {}))
