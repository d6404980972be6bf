"""The sizes of axes that follow from those in a config."""

from __future__ import annotations

import math

from .schema import Config


def data_size(config: Config, world_size: int) -> int:
    """Returns the number of data ranks: world size / (tensor * pipeline)."""
    return max(1, world_size // (config.parallel.tensor.size * config.parallel.pipeline.size))


def context_size(config: Config) -> int:
    """Returns the number of ranks of a tensor group that have different queries of the same heads; 1 without 2D sequence
    parallelism."""
    two = config.parallel.sequence_2D
    return two.context_size if two.enable else 1


def head_size(config: Config) -> int:
    """Returns the number of ranks that share the heads in attention."""
    return config.parallel.tensor.size // context_size(config)


def expert_inner_size(config: Config) -> int:
    """Returns the number of ranks over which each expert is sharded: those of the tensor axis, or in isp those of the expert
    weight axis."""
    parallel = config.parallel
    if parallel.tensor.mode == "isp":
        return parallel.expert_weight.size
    return 1 if parallel.expert.no_tp else parallel.tensor.size


def expert_ranks(config: Config, world_size: int) -> int:
    """Returns the number of ranks of a stage that have the same shard of the experts that they have."""
    return max(1, world_size // (config.parallel.pipeline.size * expert_inner_size(config)))


def expert_size(config: Config, world_size: int) -> int:
    """Returns the number of ranks that have different experts."""
    size = config.parallel.expert.size
    return size if size > 0 else math.gcd(expert_ranks(config, world_size), config.model.num_experts)


def smallest_world(config: Config) -> int:
    """Returns the smallest world size that the sizes of all axes fit into."""
    parallel = config.parallel
    weights = inner_size(config) * max(1, parallel.zero1.size)
    experts = max(1, parallel.expert.size) * expert_inner_size(config) * max(1, parallel.expert_zero1.size)
    views = (parallel.tensor.size, weights, *([experts] if config.model.num_experts > 1 else []))
    return parallel.pipeline.size * math.lcm(*views)


def inner_size(config: Config) -> int:
    """Returns how many ranks a layer's weights are sharded over by the tensor or weight axis."""
    parallel = config.parallel
    return parallel.weight.size if parallel.tensor.mode == "isp" else parallel.tensor.size
