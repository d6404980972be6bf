"""The ranks that update matrices together (``matrices.py``): how parts become whole matrices, and updates parts again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Size, Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..models.layers import DecoderLayer
from .collectives import Group, all_gather, send_parts
from .layout import Layout, Meshes
from .matrices import Job, Matrix, Wave, divided, matrices, waves


def teams(layers: Sequence[tuple[int, DecoderLayer]], layout: Layout, meshes: Meshes | None) -> list[Team]:
    """Makes the teams that update the matrices of layers."""
    dense, experts = divided(matrices(layers), layout)
    of_dense, of_experts = (None, None) if meshes is None else (meshes.shards, meshes.expert_shards)
    found = [Team(dense, layout, of_dense, apart=False)]
    return [*found, Team(experts, layout, of_experts, apart=True)] if experts else found


class Team:
    """The ranks that have the dense weights of a stage, or its experts."""

    def __init__(self, weights: Sequence[Matrix], layout: Layout, mesh: DeviceMesh | None, apart: bool) -> None:
        """
        Args:
            weights: those that the team updates.
            mesh: dimensions replicate and shards. None: this rank is alone.
            apart: whether they are experts on ranks of their own.
        """
        self.shapes = {weight.name: weight.shape for weight in weights}
        """Name -> shape of the full weight."""
        replica, rank = (0, 0) if mesh is None else (mesh.get_local_rank("replicate"), mesh.get_local_rank("shards"))
        self.waves = waves(weights, layout, apart, replica, rank)
        self.replicate, self.shards = (_group(mesh, axis) for axis in ("replicate", "shards"))

    def run(
        self, direction: Callable[[str], Tensor], compute: Callable[[Tensor], Tensor], nothing: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields the name of each weight and this rank's part of its update. Every rank must take all of them.

        Args:
            direction: returns this rank's part of what the update of a weight is computed from. It is called once for each.
            compute: returns the update of whole matrices.
            nothing: no elements, of the dtype and on the device of directions.
        """
        for wave in self.waves:
            parts = {job.name: direction(job.name) for job in wave.parts}
            shapes = {name: part.shape for name, part in parts.items()}
            updates = self._updates(wave, parts, compute, nothing)
            if self.replicate is not None:
                updates = self._share(wave, updates, shapes, nothing)
            yield from ((name, update.view(shapes[name])) for name, update in _popped(updates))

    def _updates(
        self, wave: Wave, parts: dict[str, Tensor], compute: Callable[[Tensor], Tensor], nothing: Tensor
    ) -> dict[str, Tensor]:
        """Returns this rank's parts of what its replica computes, and empties ``parts``."""
        mine, ranks = wave.mine, range(len(wave.sent))
        if not wave.travels:
            found = {} if mine is None else {mine.name: compute(parts[mine.name])}
            parts.clear()
            return found
        assert self.shards is not None
        flat = torch.cat([nothing, *(parts[job.name].reshape(-1) for job in wave.given)])
        parts.clear()
        arrived = send_parts(flat, wave.sent, wave.received, self.shards)
        del flat
        owned = [nothing]
        if mine is not None:
            update = compute(_put_together(mine, arrived, wave.received))
            owned = [mine.cut(update, rank).reshape(-1) for rank in ranks if wave.sent_back[rank]]
        back = send_parts(torch.cat(owned), wave.sent_back, wave.received_back, self.shards)
        return _split(back, wave.shared[wave.replica], wave.rank)

    def _share(self, wave: Wave, updates: dict[str, Tensor], shapes: Mapping[str, Size], nothing: Tensor) -> dict[str, Tensor]:
        """Returns this rank's parts of what all replicas compute."""
        assert self.replicate is not None
        if not wave.space:
            return updates
        own = [update.reshape(-1) for update in updates.values()]
        rest = wave.space - sum(part.numel() for part in own)
        gathered = all_gather(torch.cat([*own, nothing.new_zeros(rest)]), self.replicate).split(wave.space)
        found = dict[str, Tensor]()
        for jobs, values in zip(wave.shared, gathered, strict=True):
            found |= _split(values, jobs, wave.rank)
        return found


def _group(mesh: DeviceMesh | None, axis: str) -> Group | None:
    return mesh[axis].get_group() if mesh is not None and mesh[axis].size() > 1 else None


def _put_together(job: Job, arrived: Tensor, received: Sequence[int]) -> Tensor:
    """Returns a whole matrix from its parts, which are one after the other, in the order of the ranks that have sent them."""
    senders = [rank for rank, size in enumerate(received) if size]
    rows, columns = job.unit.shape[-2:]
    tops = [job.unit.parts[rank][0][0] for rank in senders]
    if len(job.unit.shape) == 2 and tops == sorted(tops) and all(job.unit.parts[rank][1] == (0, columns) for rank in senders):
        return arrived.view(rows, columns)
    whole = arrived.new_empty(job.unit.shape)
    for rank, values in zip(senders, arrived.split([size for size in received if size]), strict=True):
        part = job.cut(whole, rank)
        part.copy_(values.view(part.shape))
    return whole


def _split(values: Tensor, jobs: Sequence[Job], rank: int) -> dict[str, Tensor]:
    """Returns the parts of a rank, which are one after the other in ``values``."""
    sizes = [job.size(rank) for job in jobs]
    return dict(zip((job.name for job in jobs), values[: sum(sizes)].split(sizes), strict=True))


def _popped(found: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields what is in a dict and empties it, so that nothing keeps what a wave has gathered while the next one does."""
    while found:
        name = next(iter(found))
        yield name, found.pop(name)
