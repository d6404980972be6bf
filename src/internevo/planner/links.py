"""Times of collectives: alpha + bytes / beta, by kind and by where the ranks of a group are.

A group is ``size`` ranks, ``stride`` apart. With n ranks, of which k are in a node, and X bytes of the full tensor:

| collective     | algorithm    | latencies                           | bytes through a rank's link              |
|----------------|--------------|-------------------------------------|------------------------------------------|
| all-gather     | ring         | n-1                                 | X (n-1)/n                                |
| reduce-scatter | ring         | n-1                                 | X (n-1)/n                                |
| all-reduce     | ring         | 2 (n-1)                             | 2 X (n-1)/n                              |
| all-to-all     | direct       | log2(n)                             | X (k-1)/n inside and X (n-k)/n across    |
| send           | direct       | 1                                   | X                                        |

(Thakur et al. 2005, https://doi.org/10.1177/1094342005051521; as in NCCL, whose trees are for small all-reduces, which do not
count in a step.) All ranks of a ring take a step together, so that each of its steps is as slow as the slowest link: one across
nodes, if there is one. A ring over nodes enters and leaves each node once, through the network cards of all k members, so that
each byte crosses at k times the rate of one GPU, but not faster than the link inside. All groups of a layout communicate at the
same time: a GPU has its own share of the network, and groups with one member in each node (k = 1) have no more than that share.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .calibration import Calibration
from .hardware import GIGA, GPU


class Group(NamedTuple):
    """Where the ranks of a group are."""

    size: int
    stride: int

    def in_node(self, gpus_per_node: int) -> int:
        """Returns how many of its ranks are in one node, at least. (Groups of an axis are next to each other, so that nodes cut
        them at multiples of what the sizes of both have in common.)"""
        return max(1, math.gcd(gpus_per_node, self.size * self.stride) // self.stride)


def seconds(kind: str, count: float, nbytes: float, group: Group, gpu: GPU, calibration: Calibration) -> float:
    """Returns the time of ``count`` collectives of ``nbytes`` together (``strategy.Collectives``).

    Raises:
        ValueError: for an unknown kind.
    """
    n = group.size
    if n == 1 or count == 0:
        return 0.0
    k = group.in_node(gpu.gpus_per_node)
    inside = gpu.node_gb_per_s * GIGA * calibration.inside
    across = gpu.network_gb_per_s * GIGA * calibration.across
    if kind == "send":
        near = group.stride < gpu.gpus_per_node
        return count * (calibration.hop_inside if near else calibration.hop_across) + nbytes / (inside if near else across)
    hop = calibration.hop_across if n > k else calibration.hop_inside
    if kind == "all-to-all":
        return count * math.log2(n) * hop + max(nbytes * (k - 1) / n / inside, nbytes * (n - k) / n / across)
    ring = count * (n - 1) * hop + nbytes * (n - 1) / n / (inside if n == k else min(inside, k * across))
    if kind in ("all-gather", "reduce-scatter"):
        return ring
    if kind == "all-reduce":
        return 2 * ring
    raise ValueError(f"unknown collective {kind}")
