"""The layout: how many ranks each axis has, and who is in which group. Arithmetic only; the groups are made from it later.

There are two views of one world, because in isp the weights are cut over other ranks than the sequence:

- activations: pipeline x data x tensor. ``tensor`` ranks share one sample, ``data`` ranks see different ones.
- weights: pipeline x replicate x zero x inner. ``inner`` ranks (tensor, or weight in isp) have different parts of a layer's
  weights; ``zero`` ranks share out the optimizer state of each part; ``replicate`` copies of that are there.

The fastest axis is the last one, so that the groups which talk most are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..config import Config


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes."""

    world: int
    tensor: int
    mode: str
    """mtp, msp, fsp or isp."""
    weight: int
    pipeline: int
    zero: int
    """Ranks that share one optimizer state (and, with fsdp, parameters and gradients)."""
    fsdp: bool
    kv_copies: int = 1
    """Ranks of a tensor group that hold the same key/value heads, as there are fewer of them than ranks. (isp has none.)"""

    @classmethod
    def of(cls, config: Config, world: int) -> Layout:
        """From the config and the number of processes; ``check`` has made sure that they fit."""
        parallel = config.parallel
        tensor, weight, pipeline = parallel.tensor.size, parallel.weight.size, parallel.pipeline.size
        mode = parallel.tensor.mode
        outer = world // ((weight if mode == "isp" else tensor) * pipeline)
        zero = parallel.zero1.size if parallel.zero1.size > 0 else outer
        kv_heads = config.model.num_kv_attention_heads or config.model.num_attention_heads
        copies = max(1, tensor // kv_heads) if mode != "isp" else 1
        return cls(world, tensor, mode, weight, pipeline, zero, parallel.zero1.fsdp, copies)

    @property
    def data(self) -> int:
        """Ranks that see different rows."""
        return self.world // (self.tensor * self.pipeline)

    @property
    def inner(self) -> int:
        """Ranks that hold different parts of a layer's weights."""
        return self.weight if self.mode == "isp" else self.tensor

    @property
    def replicate(self) -> int:
        """Copies of the optimizer state."""
        return self.world // (self.pipeline * self.inner * self.zero)

    @property
    def cuts_sequence(self) -> bool:
        """Whether the ranks of a tensor group have different tokens outside attention."""
        return self.tensor > 1 and self.mode != "mtp"

    def data_rank(self, rank: int) -> int:
        """Which rows a rank sees."""
        return rank // self.tensor % self.data

    def weight_mesh(self, device_type: str) -> DeviceMesh:
        """The view of weights as ("replicate", "zero", "inner"); creates the groups, so every rank must call it. With copies of
        key/value heads, "inner" is ("heads", "copies") as one."""
        outer = (self.replicate, self.zero)
        if self.kv_copies == 1:
            return init_device_mesh(device_type, (*outer, self.inner), mesh_dim_names=("replicate", "zero", "inner"))
        sizes = (*outer, self.inner // self.kv_copies, self.kv_copies)
        mesh = init_device_mesh(device_type, sizes, mesh_dim_names=("replicate", "zero", "heads", "copies"))
        mesh["heads", "copies"]._flatten("inner")
        return mesh

    def activation_mesh(self, device_type: str) -> DeviceMesh:
        """The view of activations as ("data", "tensor"); creates the groups, so every rank must call it."""
        return init_device_mesh(device_type, (self.data, self.tensor), mesh_dim_names=("data", "tensor"))

    def groups(self) -> dict[str, list[list[int]]]:
        """Ranks of every group of every axis that has more than one."""
        per_stage = self.world // self.pipeline
        weights = {"inner": 1, "zero": self.inner, "replicate": self.inner * self.zero}
        names = {"inner": "weight" if self.mode == "isp" else "tensor", "zero": "zero", "replicate": "replicate"}
        sizes = {"inner": self.inner, "zero": self.zero, "replicate": self.replicate}
        found = {names[axis]: self._groups(sizes[axis], weights[axis]) for axis in weights}
        found |= {"tensor": self._groups(self.tensor, 1), "data": self._groups(self.data, self.tensor)}
        found["kv copies"] = self._groups(self.kv_copies, 1)
        found["pipeline"] = self._groups(self.pipeline, per_stage)
        return {axis: groups for axis, groups in found.items() if len(groups[0]) > 1}

    def _groups(self, size: int, stride: int) -> list[list[int]]:
        """Groups of ``size`` ranks that are ``stride`` apart."""
        firsts = [rank for rank in range(self.world) if rank // stride % size == 0]
        return [[first + n * stride for n in range(size)] for first in firsts]

    def describe(self) -> list[tuple[str, int, str]]:
        """(axis, size, meaning), for people."""
        kind = "FSDP" if self.fsdp else "ZeRO-1.5" if self.zero > 1 else "plain data parallel"
        return [
            ("world", self.world, "processes"),
            ("data", self.data, "ranks with rows of their own"),
            ("tensor", self.tensor, f"ranks that share one sample ({self.mode})"),
            ("weight", self.weight, "ranks that share one copy of each weight (isp)"),
            ("zero", self.zero, f"ranks that share one optimizer state ({kind})"),
            ("replicate", self.replicate, "copies of the optimizer state"),
            ("pipeline", self.pipeline, "stages"),
        ]
