"""The layout: how many ranks each axis has. Arithmetic only; the groups are made from it later."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..config.parallel import Parallel


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes. Rank order, fastest first: tensor, data, pipeline; ZeRO groups are consecutive data ranks."""

    world: int
    tensor: int
    pipeline: int
    zero: int
    """Data ranks that share one optimizer state (and, with fsdp, parameters and gradients)."""
    fsdp: bool

    @classmethod
    def of(cls, parallel: Parallel, world: int) -> Layout:
        """From the config and the number of processes; ``check`` has made sure that they fit."""
        tensor, pipeline = parallel.tensor.size, parallel.pipeline.size
        data = world // (tensor * pipeline)
        zero = parallel.zero1.size if parallel.zero1.size > 0 else data
        return cls(world, tensor, pipeline, zero, parallel.zero1.fsdp)

    @property
    def data(self) -> int:
        """Ranks that see different rows."""
        return self.world // (self.tensor * self.pipeline)

    @property
    def replicate(self) -> int:
        """Copies of the optimizer state."""
        return self.data // self.zero

    def data_rank(self, rank: int) -> int:
        """Which rows a rank sees."""
        return rank // self.tensor % self.data

    def data_mesh(self, device_type: str) -> DeviceMesh:
        """The data axis as ("replicate", "zero"); creates the groups, so every rank must call it."""
        return init_device_mesh(device_type, (self.replicate, self.zero), mesh_dim_names=("replicate", "zero"))

    def describe(self) -> list[tuple[str, int, str]]:
        """(axis, size, meaning), for people."""
        kind = "FSDP" if self.fsdp else "ZeRO-1.5" if self.zero > 1 else "plain data parallel"
        return [
            ("world", self.world, "processes"),
            ("data", self.data, "ranks with rows of their own"),
            ("zero", self.zero, f"data ranks that share one optimizer state ({kind})"),
            ("replicate", self.replicate, "copies of the optimizer state"),
            ("tensor", self.tensor, "ranks that share one sample"),
            ("pipeline", self.pipeline, "stages"),
        ]
