"""Measures what this machine reaches of its peaks: matrix products, attention, memory, kernel launches and collectives.

The times are turned into the numbers of a ``Calibration`` by the formulas that ``kernels`` and ``links`` predict times with.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..ops.precision import COMPUTE
from ..parallel.views import Groups
from ..parallel.world import World
from .calibration import SMALLEST, Calibration
from .hardware import GIGA, GPU, GPUS, TERA

SECONDS = 0.4
"""How long each kernel is measured."""
REPEATS = 8
"""How many times each collective is measured."""
GUESS = 10.0
"""Bandwidth of a link that no process has used, in GB/s."""


class Line(NamedTuple):
    """A collective takes ``alpha`` seconds, and ``beta`` for each byte."""

    alpha: float
    beta: float


@dataclass
class Measured:
    """What was measured, by the slowest rank: a step waits for it."""

    products: dict[int, float]
    """Size of the matrices -> seconds."""
    attention: tuple[float, float]
    """FLOPs and seconds of a forward and a backward pass."""
    memory: float
    """Bytes per second of a copy, reading and writing."""
    launch: float
    """Seconds of a kernel that does nearly nothing."""
    inside: dict[str, Line]
    """Kind -> the time of a collective inside a node. Empty, as the next one: there is one process."""
    across: dict[str, Line]
    """The same of ranks on different nodes."""
    per_node: int
    """Processes on a node."""
    nodes: int


def measure(world: World, per_node: int) -> Measured:
    """Measures. Every rank must call it.

    Args:
        per_node: number of ranks on each node.
    """
    device = world.device
    large = device.type == "cuda"
    nodes = world.size // per_node
    groups = Groups()
    near = [list(range(first, first + per_node)) for first in range(0, world.size, per_node)]
    far = [list(range(first, world.size, per_node)) for first in range(per_node)]
    return Measured(
        {size: _product(size, device) for size in ((1024, 2048, 4096, 8192) if large else (256, 512, 1024))},
        _attention(device, 4096 if large else 512, 32 if large else 4),
        _copy(device, 2**30 if large else 2**26),
        _launch(device),
        _collectives(groups.get(near), per_node, device) if per_node > 1 else {},
        _collectives(groups.get(far), nodes, device) if nodes > 1 else {},
        per_node, nodes,
    )  # fmt: skip


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Returns the median time of a kernel on the slowest rank. Several run one after the other, after some that do not count:
    they choose an algorithm, and a GPU that was idle is slower."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < SECONDS / 4:
        run()
        _wait(device)
    times, begin, number = list[float](), time.perf_counter(), 1
    while not times or time.perf_counter() - begin < SECONDS:
        _wait(device)
        start = time.perf_counter()
        for _ in range(number):
            run()
        _wait(device)
        times.append((time.perf_counter() - start) / number)
        number = max(1, min(100, int(0.02 / times[-1])))
    return _slowest([statistics.median(times)], device)[0]


def _slowest(seconds: list[float], device: torch.device) -> list[float]:
    """Returns each of these times on the rank where it is the longest."""
    found = torch.tensor(seconds, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return [float(value) for value in found]


def _launch(device: torch.device) -> float:
    small = torch.ones(16, device=device)
    return _seconds(lambda: small.add_(1), device)


def _product(size: int, device: torch.device) -> float:
    a, b = (torch.randn(size, size, device=device).to(COMPUTE["bfloat16"]) for _ in range(2))
    return _seconds(lambda: a @ b, device)


def _attention(device: torch.device, tokens: int, heads: int) -> tuple[float, float]:
    """Returns the FLOPs and the seconds of both passes: 2 products, and 5 in the backward pass (see ``flops``)."""
    size = 128
    q, k, v, grad = (torch.randn(1, heads, tokens, size, device=device).to(COMPUTE["bfloat16"]) for _ in range(4))
    for tensor in (q, k, v):
        tensor.requires_grad_()

    def run() -> None:
        torch.autograd.grad(scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), grad)

    return (2 + 5) * 2.0 * tokens * heads * size * tokens / 2, _seconds(run, device)


def _copy(device: torch.device, nbytes: int) -> float:
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / _seconds(lambda: target.copy_(source), device)


def _collectives(group: dist.ProcessGroup, ranks: int, device: torch.device) -> dict[str, Line]:
    """Measures each kind with several sizes of the full tensor."""
    sizes = [2**16, 2**20, 2**24] + ([2**28] if device.type == "cuda" else [])
    found: dict[str, list[float]] = {}
    for nbytes in sizes:
        for kind, run in _kinds(group, ranks, torch.ones(nbytes // 4 // ranks * ranks, device=device)).items():
            times = []
            run()
            for _ in range(REPEATS):
                dist.barrier(group)
                _wait(device)
                start = time.perf_counter()
                run()
                _wait(device)
                times.append(time.perf_counter() - start)
            found.setdefault(kind, []).append(statistics.median(_slowest(times, device)))
    return {kind: _line(sizes, times) for kind, times in found.items()}


def _kinds(group: dist.ProcessGroup, ranks: int, full: Tensor) -> dict[str, Callable[[], object]]:
    """Returns the collectives that are measured."""
    part, other = full.chunk(ranks)[0].clone(), torch.empty_like(full)
    return {
        "all-gather": lambda: dist.all_gather_into_tensor(full, part, group=group),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, full, group=group),
        "all-reduce": lambda: dist.all_reduce(full, group=group),
        "all-to-all": lambda: dist.all_to_all_single(other, full, group=group),
    }


def _line(sizes: Sequence[int], times: Sequence[float]) -> Line:
    """Returns the line through the smallest and the largest collective."""
    beta = max(1e-15, (times[-1] - times[0]) / (sizes[-1] - sizes[0]))
    return Line(max(0.0, times[0] - beta * sizes[0]), beta)


# What follows --------------------------------------------------------------------------------------------------------


def known_gpu(device: torch.device) -> GPU | None:
    """Returns the GPU of this machine, if the table has it: of those of its name the one with the most similar memory. (Cards
    for PCIe are not in the table: they are slower, and so is what connects them.)"""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).lower().replace("-", " ").split()
    size = torch.cuda.get_device_properties(device).total_memory / 2**30
    alike = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in words and not {"pcie", "nvl"} & set(words)]
    return min(alike, key=lambda gpu: abs(gpu.memory_gib - size), default=None)


def as_gpu(measured: Measured, device: torch.device) -> GPU:
    """Describes the machine by what it reaches, because its peaks are not known."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, gib = properties.name, properties.total_memory / 2**30
    else:
        name, gib = "cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    tflops = max(2.0 * size**3 / seconds for size, seconds in measured.products.items()) / TERA
    near, far = (_bandwidth(lines, ranks) for lines, ranks in _linked(measured))
    return GPU(name, tflops, 0.0, gib, measured.memory / GIGA, measured.per_node, near or GUESS, far or near or GUESS, 0.0, 0.0)


def _linked(measured: Measured) -> tuple[tuple[dict[str, Line], int], tuple[dict[str, Line], int]]:
    return (measured.inside, measured.per_node), (measured.across, measured.nodes)


def _bandwidth(lines: dict[str, Line], ranks: int) -> float | None:
    """Returns the GB/s of a ring."""
    rings = [(ranks - 1) / ranks / lines[kind].beta / GIGA for kind in ("all-gather", "reduce-scatter") if lines]
    return statistics.mean(rings) if rings else None


def calibration(measured: Measured, gpu: GPU) -> Calibration:
    """Returns the numbers with which the formulas predict what was measured on this GPU. Others have their default values."""

    def share(value: float) -> float:
        return min(1.0, max(SMALLEST, value))

    memory = share(measured.memory / (gpu.memory_gb_per_s * GIGA))
    size, seconds = max(measured.products.items())
    moved = 3 * size * size * 2 / (gpu.memory_gb_per_s * GIGA * memory)
    computing = max(seconds / 2, seconds - moved - measured.launch)  # see ``kernels.seconds``
    flops, attention = measured.attention
    found = Calibration(
        products=share(2.0 * size**3 / computing / gpu.peak("bf16")),
        attention=share(flops / max(attention / 2, attention - measured.launch) / gpu.peak("bf16")),
        memory=memory,
        launch=measured.launch,
    )
    (inside, near), (across, far) = _linked(measured)
    near_rate, far_rate = _bandwidth(inside, near), _bandwidth(across, far)
    if near_rate is not None:
        hop = statistics.mean(inside[kind].alpha for kind in ("all-gather", "reduce-scatter")) / (near - 1)
        found = replace(found, inside=share(near_rate / gpu.node_gb_per_s), hop_inside=hop)
    if far_rate is not None:
        hop = statistics.mean(across[kind].alpha for kind in ("all-gather", "reduce-scatter")) / (far - 1)
        found = replace(found, across=share(far_rate / gpu.network_gb_per_s), hop_across=hop)
    return found


def lines(measured: Measured, gpu: GPU, found: Calibration) -> list[str]:
    """Returns what to print."""
    text = [f"{'':32}{'measured':>14}{'of the peak':>14}"]
    for size, seconds in measured.products.items():
        rate = 2.0 * size**3 / seconds
        text.append(f"{f'product {size} x {size} x {size}, bf16':32}{rate / TERA:>7.2f} TFLOPS{rate / gpu.peak('bf16'):>14.1%}")
    flops, seconds = measured.attention
    rate = flops / seconds
    text.append(f"{'attention, causal, both passes':32}{rate / TERA:>7.2f} TFLOPS{rate / gpu.peak('bf16'):>14.1%}")
    text.append(f"{'memory':32}{measured.memory / GIGA:>9.1f} GB/s{measured.memory / GIGA / gpu.memory_gb_per_s:>14.1%}")
    text.append(f"{'smallest kernel':32}{measured.launch * 1e6:>11.1f} us")
    for where, (kinds, ranks) in zip(("in a node", "over nodes"), _linked(measured), strict=True):
        for kind, line in kinds.items():
            speed = f"{1 / line.beta / GIGA:>9.2f} GB/s, and {line.alpha * 1e6:.0f} us"
            text.append(f"{f'{kind}, {ranks} ranks {where}':32}{speed}")
    not_measured = ["products_fp8", "overlap", "step"]
    not_measured += [key for key, kinds in (("inside", measured.inside), ("across", measured.across)) if not kinds]
    return [*text, f"not measured, and left at their defaults: {', '.join(not_measured)}"]
