"""The layout: the size of every axis, and which ranks are in which group.

``Layout`` is arithmetic. ``Meshes``, at the end of this file, makes the process groups of a run from it.

The world has several views, because activations, weights and experts may be sharded over different ranks:

| view        | axes                                           | what the ranks along an axis have                             |
|-------------|------------------------------------------------|---------------------------------------------------------------|
| activations | stage, data, tensor                            | data: different rows; tensor: parts of the same rows          |
| weights     | stage, replicate, zero, inner                  | inner (tensor, or weight in isp): different shards of each    |
|             |                                                | layer; zero: different shards of the optimizer state of such  |
|             |                                                | a shard; replicate: replicas of all that                      |
| attention   | stage, data, context, head                     | the tensor axis in two, with 2D sequence parallelism. head:   |
|             |                                                | different heads; context: different queries of the same heads |
| experts     | stage, replicate, zero, expert, inner          | expert: different experts; inner: different shards of each    |
|             |                                                | expert; zero, replicate: as above                             |

Neighbouring ranks differ in the last axis. The axes that communicate most come last, so that their groups are inside a node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch.distributed.device_mesh import DeviceMesh

from ..config import Config
from ..config.axes import context_size, expert_inner_size, expert_size
from .orders import rank_of
from .views import Groups, View


@dataclass(frozen=True)
class Layout:
    """The sizes of all axes."""

    world: int
    """Number of ranks."""
    tensor: int
    """Ranks that share the same rows."""
    mode: str
    """The tensor mode: mtp, msp, fsp or isp."""
    weight: int
    """isp: ranks over which each weight is sharded."""
    pipeline: int
    """Number of stages."""
    zero: int
    """Ranks over which the optimizer state is sharded (with FSDP, parameters and gradients as well)."""
    fsdp: bool
    """Whether parameters and gradients are sharded over the zero axis, too."""
    kv_replicas: int = 1
    """Ranks of a tensor group that have the same key/value head, if there are fewer of these heads than ranks; 1 in isp."""
    chunks: int = 1
    """Stages on each pipeline rank."""
    schedule: str = "1F1B"
    """The schedule of the pipeline, which decides where its stages are."""
    expert: int = 1
    """Ranks that have different experts."""
    expert_inner: int = 1
    """Ranks over which each expert is sharded: those of the tensor axis, or in isp those of the expert weight axis."""
    expert_zero: int = 1
    """Ranks over which the optimizer state of an expert is sharded."""
    context: int = 1
    """isp: ranks of a tensor group that have different queries of the same heads (2D sequence parallelism)."""
    head_first: bool = True
    """Whether the ranks of a tensor group that share the heads are neighbours; otherwise those that share the queries are."""
    muon: bool = False
    """Whether the optimizer puts matrices together (``matrices.py``)."""

    @classmethod
    def from_config(cls, config: Config, world: int) -> Layout:
        """Takes the sizes from a config that ``train.check`` has accepted for this world size."""
        parallel, heads = config.parallel, config.model.num_kv_attention_heads or config.model.num_attention_heads
        layout = cls.of(
            world, parallel.tensor.size, parallel.tensor.mode, parallel.weight.size, parallel.pipeline.size,
            parallel.zero1.size, parallel.zero1.fsdp, heads, config.model.num_chunks, parallel.pipeline.mode,
        )  # fmt: skip
        layout = layout.with_options(config, context_size(config))
        if config.model.num_experts == 1:
            return layout
        return layout.with_experts(expert_size(config, world), expert_inner_size(config), parallel.expert_zero1.size)

    @classmethod
    def of(
        cls,
        world: int,
        tensor: int,
        mode: str,
        weight: int,
        pipeline: int,
        zero: int,
        fsdp: bool,
        kv_heads: int,
        chunks: int,
        schedule: str,
    ) -> Layout:
        """Returns the layout of a model without experts.

        Args:
            zero: if it is not positive, as many ranks as possible.
        """
        inner = weight if mode == "isp" else tensor
        ranks = zero if zero > 0 else world // (inner * pipeline)
        replicas = max(1, tensor // kv_heads) if mode != "isp" else 1
        return cls(world, tensor, mode, weight, pipeline, ranks, fsdp, replicas, chunks, schedule, 1, inner, ranks)

    def with_options(self, config: Config, context: int) -> Layout:
        """Returns the same layout with this number of context ranks, and what else a config says besides sizes."""
        head_first = config.parallel.sequence_2D.device_placement_strategy.head_first
        return replace(self, context=context, head_first=head_first, muon=config.muon is not None)

    def with_experts(self, expert: int, inner: int, zero: int) -> Layout:
        """Returns the same layout of a model with experts.

        Args:
            zero: if it is not positive, as many ranks as possible, of those over which the state of dense weights is sharded.
        """
        rest = max(1, self.world // (self.pipeline * inner)) // expert
        everywhere = self.zero == self.world // (self.inner * self.pipeline)
        ranks = zero if zero > 0 else rest if everywhere else math.gcd(self.zero, rest)
        return replace(self, expert=expert, expert_inner=inner, expert_zero=ranks)

    # The views -------------------------------------------------------------------------------------------------

    @property
    def activations(self) -> View:
        """Which rows a rank has, and which part of them."""
        return View({"stage": self.pipeline, "data": self.data, "tensor": self.tensor})

    @property
    def attention(self) -> View:
        """Which heads and which queries a rank has, with 2D sequence parallelism."""
        two = {"context": self.context, "head": self.head} if self.head_first else {"head": self.head, "context": self.context}
        return View({"stage": self.pipeline, "data": self.data, **two})

    @property
    def weights(self) -> View:
        """Which shard of the dense weights a rank has."""
        return View({"stage": self.pipeline, "replicate": self.replicate, "zero": self.zero, "inner": self.inner})

    @property
    def experts(self) -> View:
        """Which experts a rank has, and which shard of each."""
        replicate = self.world // (self.pipeline * self.expert_zero * self.expert * self.expert_inner)
        return View({
            "stage": self.pipeline, "replicate": replicate, "zero": self.expert_zero,
            "expert": self.expert, "inner": self.expert_inner,
        })  # fmt: skip

    @property
    def shards(self) -> View:
        """The weights, with the ranks that together have all shards of a replica as one axis."""
        return View({"stage": self.pipeline, "replicate": self.replicate, "shards": self.zero * self.inner})

    @property
    def expert_shards(self) -> View:
        """The same for experts."""
        axes = self.experts.axes
        shards = axes["zero"] * axes["expert"] * axes["inner"]
        return View({"stage": self.pipeline, "replicate": axes["replicate"], "shards": shards})

    @property
    def kv_weights(self) -> View:
        """The weights of keys and values: different shards along ``heads``, replicas along ``kv_replicas``."""
        axes = self.weights.axes
        inner = axes.pop("inner")
        return View({**axes, "heads": inner // self.kv_replicas, "kv_replicas": self.kv_replicas})

    # What follows from the sizes and the views ------------------------------------------------------------------------

    @property
    def data(self) -> int:
        """The number of ranks with different rows."""
        return self.world // (self.tensor * self.pipeline)

    @property
    def head(self) -> int:
        """The number of ranks of a tensor group that have different heads in attention."""
        return self.tensor // self.context

    @property
    def stages(self) -> int:
        """The number of stages of a pipeline."""
        return self.pipeline * self.chunks

    def rank_of_stage(self, stage: int) -> int:
        """Returns the pipeline rank that a stage is on."""
        return rank_of(stage, self.pipeline, self.schedule)

    @property
    def inner(self) -> int:
        """The number of ranks over which the weights of a layer are sharded by the tensor mode."""
        return self.weight if self.mode == "isp" else self.tensor

    @property
    def replicate(self) -> int:
        """The number of replicas of the optimizer state."""
        return self.world // (self.pipeline * self.inner * self.zero)

    @property
    def experts_apart(self) -> bool:
        """Whether the weights of experts are over other ranks than the dense ones, and so are units of their own."""
        return self.expert > 1 or self.expert_inner != self.inner

    @property
    def experts_by_tensor(self) -> bool:
        """Whether experts are sharded over the tensor axis, as a dense MLP is. Each rank has all tokens of its rows then."""
        return self.mode != "isp" and self.expert_inner == self.tensor

    @property
    def shards_sequence(self) -> bool:
        """Whether the ranks of a tensor group have different tokens outside attention."""
        return self.tensor > 1 and self.mode != "mtp"

    def data_rank(self, rank: int) -> int:
        """Returns a rank's position along the data axis. Ranks with the same position have the same rows."""
        return self.activations.coordinate(rank)["data"]

    def is_first_with_its_rows(self, rank: int) -> bool:
        """Returns whether a rank is the first of those that have the same rows."""
        coordinate = self.activations.coordinate(rank)
        return all(coordinate[axis] == 0 for axis in coordinate if axis != "data")

    def groups(self) -> dict[str, list[list[int]]]:
        """Returns axis -> the ranks of each of its groups, for all axes of more than one rank. Messages use these names."""
        found = {name: view.groups(axis) for name, (view, axis) in self._named_axes().items()}
        if self._last:
            found["first and last"] = [[ranks[0], ranks[self._last]] for ranks in found["pipeline"]]
        return found

    def sizes(self) -> dict[str, int]:
        """Returns axis -> number of ranks of each of its groups, for the axes of ``groups``."""
        pair = {"first and last": 2} if self._last else {}
        return {name: view.axes[axis] for name, (view, axis) in self._named_axes().items()} | pair

    def groups_of(self, rank: int) -> dict[str, list[int]]:
        """Returns axis -> the ranks of the group that a rank is in, for the axes of ``groups``. For "first and last", those are
        of its pipeline."""
        found = {name: view.group(axis, rank) for name, (view, axis) in self._named_axes().items()}
        if self._last:
            found["first and last"] = [found["pipeline"][0], found["pipeline"][self._last]]
        return found

    def _named_axes(self) -> dict[str, tuple[View, str]]:
        """Returns the name of an axis in messages -> the view that it belongs to, and its name there."""
        weights, activations = self.weights, self.activations
        found = {
            "weight" if self.mode == "isp" else "tensor": (weights, "inner"),
            "zero": (weights, "zero"),
            "replicate": (weights, "replicate"),
        }
        found |= {"tensor": (activations, "tensor"), "data": (activations, "data")}
        if self.context > 1:
            found |= {"head": (self.attention, "head"), "context": (self.attention, "context")}
        found["kv replicas"] = (self.kv_weights, "kv_replicas")
        if self.experts_apart:
            experts = self.experts
            found["expert"] = (experts, "expert")
            if self.mode == "isp":
                found["expert weight"] = (experts, "inner")
            found |= {"expert zero": (experts, "zero"), "expert replicate": (experts, "replicate")}
        if self.muon:
            found["shards"] = (self.shards, "shards")
            if self.experts_apart:
                found["expert shards"] = (self.expert_shards, "shards")
        found["pipeline"] = (weights, "stage")
        return {name: (view, axis) for name, (view, axis) in found.items() if view.axes[axis] > 1}

    @property
    def _last(self) -> int:
        """The pipeline rank of the last stage."""
        return self.rank_of_stage(self.stages - 1)

    def axis_of(self, kind: str, ranks: list[int]) -> str:
        """Returns the axis that a collective of a kind over ``ranks`` belongs to.

        If two axes have the same groups, it is the first one (for an all-to-all, tensor, head or expert). If no axis has this
        group, it is "world", which is all ranks. A message between two ranks belongs to the pipeline.
        """
        if kind == "send":
            return "pipeline"
        axes = [axis for axis, group in self.groups_of(ranks[0]).items() if group == ranks] or ["world"]
        exchanging = [axis for axis in axes if axis in ("tensor", "head", "expert")] if kind == "all-to-all" else []
        return [*exchanging, *axes][0]

    def describe(self) -> list[tuple[str, int, str]]:
        """Returns (axis, size, meaning) of every axis, for printing."""
        kind = "FSDP" if self.fsdp else "ZeRO-1.5" if self.zero > 1 else "plain data parallel"
        experts = [("expert", self.expert, "ranks that have different experts")]
        two = (
            ("head", self.head, "ranks that share the heads in attention"),
            ("context", self.context, "ranks that share the queries"),
        )
        if self.mode == "isp":
            experts.append(("expert weight", self.expert_inner, "ranks over which each expert is sharded"))
        return [
            ("world", self.world, "processes"),
            ("data", self.data, "ranks with different rows"),
            ("tensor", self.tensor, f"ranks that share the same rows ({self.mode})"),
            *(two if self.context > 1 else ()),
            ("weight", self.weight, "ranks over which each weight is sharded (isp)"),
            ("zero", self.zero, f"ranks over which the optimizer state is sharded ({kind})"),
            ("replicate", self.replicate, "replicas of the optimizer state"),
            *(experts if self.experts_apart else ()),
            (
                "pipeline",
                self.pipeline,
                f"ranks that share the layers{f', {self.chunks} stages each' if self.chunks > 1 else ''}",
            ),
        ]


@dataclass(frozen=True)
class Meshes:
    """The views as meshes of the ranks of a stage, with process groups. Axes without collectives of their own have none: what
    the data ranks add up, all ranks add up."""

    weights: DeviceMesh
    """Dimensions: replicate, zero, inner."""
    kv_weights: DeviceMesh | None
    """Dimensions: replicate, zero, heads, kv_replicas. None if no key/value head is on several ranks."""
    tensor: DeviceMesh
    """Dimension: tensor, of the activations."""
    head: DeviceMesh
    """The ranks of the tensor mesh with different heads in attention: all of them, or some with 2D sequence parallelism."""
    context: DeviceMesh | None
    """Those that have different queries of the same heads. None without 2D sequence parallelism."""
    experts: DeviceMesh | None
    """Dimensions: replicate, zero, expert, inner. None if the weights of experts are over the same ranks as the others."""
    shards: DeviceMesh | None
    """With Muon: dimensions replicate and shards, of ``Layout.shards``."""
    expert_shards: DeviceMesh | None
    """The same for experts, if their weights are over other ranks than the others."""
    groups: Groups

    @classmethod
    def from_layout(cls, layout: Layout, device_type: str) -> Meshes:
        """Makes the meshes. Every rank must call it.

        A communicator runs its collectives one after the other. So exchanges of tokens, which computation waits for, do not
        share one with weights that are gathered in advance and gradients that are reduced meanwhile. (The weights of mtp, msp
        and fsp stay where they are.)
        """
        groups = Groups()
        tokens = "tokens" if layout.mode == "isp" and layout.tensor > 1 else ""

        def mesh(view: View, axis: str) -> DeviceMesh:
            return DeviceMesh.from_group(groups.get(view.groups(axis), tokens), device_type)

        rows = "rows" if layout.expert > 1 else ""
        return cls(
            layout.weights.mesh(groups, device_type),
            layout.kv_weights.mesh(groups, device_type) if layout.kv_replicas > 1 else None,
            mesh(layout.activations, "tensor"),
            mesh(layout.attention, "head"),
            mesh(layout.attention, "context") if layout.context > 1 else None,
            layout.experts.mesh(groups, device_type, {"expert": rows}) if layout.experts_apart else None,
            layout.shards.mesh(groups, device_type) if layout.muon else None,
            layout.expert_shards.mesh(groups, device_type) if layout.muon and layout.experts_apart else None,
            groups,
        )
