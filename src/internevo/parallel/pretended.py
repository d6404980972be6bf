"""One rank of a pretended world: its collectives do nothing, and its tensors have shapes and no memory.

The process groups are PyTorch's fake ones. Tensors are fake from the moment at which a module leaves the meta
device; all before that (meshes, process groups, how the strategies shard weights) is done as in a real run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore

from ..ops.dispatch import (
    PLAIN,
    FakeTensor,
    FakeTensorMode,
    QuickMode,
    TorchDispatchMode,
    tensors_in,
    tree_leaves,
    unset_fake_temporarily,
)
from .caches import forget_layouts
from .world import World

CPU = torch.device("cpu")
UNKNOWN_SHAPES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
"""Marks of operators whose results have shapes that depend on values."""


@contextmanager
def pretend(rank: int, size: int) -> Iterator[World]:
    """Makes this process the rank ``rank`` of a world of ``size`` ranks, the others of which do not exist, on CPUs."""
    store = FakeStore()
    dist.init_process_group("fake", rank=rank, world_size=size, store=store)
    try:
        yield World(rank, size, 0, torch.device("cpu"), store)
    finally:
        dist.destroy_process_group()
        forget_layouts()


class NoMemory:
    """Tensors without memory, of which operators compute only the shapes."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def building(self) -> AbstractContextManager[Any]:
        """A context in which weights are without memory. Meshes compute with the numbers of ranks, which exist."""
        return _Weights(self.mode)

    def remembering(self) -> AbstractContextManager[Any]:
        """A context in which all that is done in ``running`` takes less time. Modes that are entered between both see all
        operators."""
        return _Remembered(self.mode)

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


class _Remembered(QuickMode):
    """Remembers what operators have returned for arguments of the same shapes. (``FakeTensorMode`` does so, too, and takes
    several times as long.)"""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self._known: dict[Any, list[_Result]] = {}
        """Operator with its arguments -> what it returns."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if FakeTensor not in types or not PLAIN.issuperset(types) or not _may_be_remembered(func):
            return func(*args, **kwargs)
        key = func, _key(args), _key(tuple(kwargs.items()))
        if known := self._known.get(key):
            made = [self._make(result, args[0]) for result in known]
            return tuple(made) if known[0].in_tuple else made[0]
        out = func(*args, **kwargs)
        outs = out if isinstance(out, tuple) else (out,)
        if all(type(x) is FakeTensor and x.device == CPU and x.layout is torch.strided for x in outs):
            new, given = ([id(x.untyped_storage()) for x in tensors_in(tree)] for tree in (outs, (args, kwargs)))
            is_view = len(outs) == 1 and type(args[0]) is FakeTensor and new[0] == id(args[0].untyped_storage())
            are_whole = all(x.untyped_storage().nbytes() == x.nbytes for x in outs)
            if is_view or (are_whole and len({*new} - {*given}) == len(outs)):
                self._known[key] = [_Result.of(x, is_view, isinstance(out, tuple)) for x in outs]
        return out

    def _make(self, result: _Result, base: Any) -> FakeTensor:
        with unset_fake_temporarily():
            shape, stride = result.shape, result.stride
            if result.is_view:
                tensor = torch.empty(0, dtype=result.dtype, device="meta")
                tensor.set_(base.untyped_storage(), result.offset, shape, stride)
            else:
                tensor = torch.empty_strided(shape, stride, dtype=result.dtype, device="meta")
        return FakeTensor(self.fake, tensor, CPU)


class _Result(NamedTuple):
    """A tensor that an operator returns."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt
    dtype: torch.dtype
    is_view: bool
    """Whether it is a view of the first argument."""
    in_tuple: bool

    @classmethod
    def of(cls, tensor: Tensor, is_view: bool, in_tuple: bool) -> _Result:
        return cls(tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, is_view, in_tuple)


@cache
def _may_be_remembered(func: Any) -> bool:
    """Whether an operator changes nothing, and returns what follows from the shapes of its arguments."""
    changes = any(value.alias_info is not None and value.alias_info.is_write for value in func._schema.arguments)
    return func.namespace in ("aten", "internevo") and not changes and not UNKNOWN_SHAPES.intersection(func.tags)


def _key(value: Any) -> Any:
    """Returns all of an argument that the result depends on. No two arguments with different results have the same."""
    if isinstance(value, Tensor):
        if type(value) is not FakeTensor or value.constant is not None:
            return object()  # equal to nothing: a number that exists
        return value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(map(_key, value))
    return type(value), value
