"""The layout: how many ranks each axis has, and who is in which group. Arithmetic only; meshes are made from it in one place.

There are three views of one world, because weights, activations and experts may be cut over different ranks:

| view        | axes, the slowest first                        | ranks along the last axes                                     |
|-------------|------------------------------------------------|---------------------------------------------------------------|
| activations | stage, data, tensor                            | tensor: share one sample; data: have different samples        |
| weights     | stage, replicate, zero, inner                  | inner (tensor, or weight in isp): have different parts of a   |
|             |                                                | layer; zero: share out the optimizer state of each part;      |
|             |                                                | replicate: have copies of it                                  |
| experts     | stage, replicate, zero, expert, inner          | expert: have different experts; inner: have different parts   |
|             |                                                | of each expert                                                |

The axes that communicate most are the last ones, so that their groups are neighbouring ranks, inside a node.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh

from ..config import Config
from .views import Groups, View


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
    expert: int = 1
    """Ranks that share the experts."""
    expert_inner: int = 1
    """Ranks that share each expert."""
    expert_zero: int = 1
    """Ranks that share the optimizer state of an expert."""

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
        return cls(world, tensor, mode, weight, pipeline, zero, parallel.zero1.fsdp, copies, expert_zero=zero)

    # The three views -------------------------------------------------------------------------------------------------

    @property
    def activations(self) -> View:
        """Who has which samples, and which part of each."""
        return View({"stage": self.pipeline, "data": self.data, "tensor": self.tensor})

    @property
    def weights(self) -> View:
        """Who has which part of the dense weights."""
        return View({"stage": self.pipeline, "replicate": self.replicate, "zero": self.zero, "inner": self.inner})

    @property
    def experts(self) -> View:
        """Who has which part of which experts."""
        replicate = self.world // (self.pipeline * self.expert_zero * self.expert * self.expert_inner)
        return View({
            "stage": self.pipeline, "replicate": replicate, "zero": self.expert_zero,
            "expert": self.expert, "inner": self.expert_inner,
        })  # fmt: skip

    @property
    def kv_weights(self) -> View:
        """The weights of keys and values: those of ``heads`` are different, those of ``copies`` the same."""
        axes = self.weights.axes
        inner = axes.pop("inner")
        return View({**axes, "heads": inner // self.kv_copies, "copies": self.kv_copies})

    # What follows from them ------------------------------------------------------------------------------------------

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
        return self.activations.coordinate(rank)["data"]

    def groups(self) -> dict[str, list[list[int]]]:
        """Ranks of every group of every axis that has more than one, by the axis's name for people."""
        weights, activations = self.weights, self.activations
        found = {
            "weight" if self.mode == "isp" else "tensor": weights.groups("inner"),
            "zero": weights.groups("zero"),
            "replicate": weights.groups("replicate"),
        }
        found |= {"tensor": activations.groups("tensor"), "data": activations.groups("data")}
        found["kv copies"] = self.kv_weights.groups("copies")
        found["pipeline"] = weights.groups("stage")
        return {axis: groups for axis, groups in found.items() if len(groups[0]) > 1}

    def axis_of(self, kind: str, ranks: list[int]) -> str:
        """The axis that a collective over ``ranks`` belongs to. Two axes may have the same groups: the first one is named (of
        an all-to-all: tensor). "world" is all ranks, where no axis has them."""
        axes = [axis for axis, groups in self.groups().items() if ranks in groups] or ["world"]
        return "tensor" if kind == "all-to-all" and "tensor" in axes else axes[0]

    def describe(self) -> list[tuple[str, int, str]]:
        """(axis, size, meaning), for people."""
        kind = "FSDP" if self.fsdp else "ZeRO-1.5" if self.zero > 1 else "plain data parallel"
        return [
            ("world", self.world, "processes"),
            ("data", self.data, "ranks with different rows"),
            ("tensor", self.tensor, f"ranks that share one sample ({self.mode})"),
            ("weight", self.weight, "ranks that share one copy of each weight (isp)"),
            ("zero", self.zero, f"ranks that share one optimizer state ({kind})"),
            ("replicate", self.replicate, "copies of the optimizer state"),
            ("pipeline", self.pipeline, "stages"),
        ]


@dataclass(frozen=True)
class Meshes:
    """The views as meshes of real process groups. All of a run's groups are made here."""

    weights: DeviceMesh
    """("stage", "replicate", "zero", "inner")"""
    kv_weights: DeviceMesh | None
    """("stage", "replicate", "zero", "heads", "copies"), where there are copies of key/value heads."""
    activations: DeviceMesh
    """("stage", "data", "tensor")"""
    experts: DeviceMesh
    """("stage", "replicate", "zero", "expert", "inner")"""

    @classmethod
    def of(cls, layout: Layout, device_type: str) -> Meshes:
        """Every rank must call it."""
        groups = Groups()
        return cls(
            layout.weights.mesh(groups, device_type),
            layout.kv_weights.mesh(groups, device_type) if layout.kv_copies > 1 else None,
            layout.activations.mesh(groups, device_type),
            layout.experts.mesh(groups, device_type),
        )
