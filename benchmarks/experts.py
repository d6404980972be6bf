"""What experts cost besides their products: ``python benchmarks/experts.py``.

| measurement | ours                                             | theirs                                                      |
|-------------|--------------------------------------------------|-------------------------------------------------------------|
| one process | dispatch, experts and combine                    | the grouped products alone, on rows that are sorted already |
| 4 processes | the same with experts over ranks                 | a plain loop with uneven all-to-alls                        |

Forward and backward passes of one layer, with the choices of the router given. Ours and theirs take turns in the same
processes, and the ratios are those of neighbours in time. Processes have one thread each, on gloo.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_to_all_single
from turns import run_processes

from internevo.models.config import DecoderConfig, Experts
from internevo.models.moe import MoE, Routing
from internevo.parallel.expert import run_experts
from internevo.parallel.world import join
from internevo.train.process import keep_freed_memory

RANKS = 4
TOKENS, SIZE, WIDTH, TOP_K = 1024, 512, 704, 2


def layer(ranks: int, rank: int, count: int) -> MoE:
    """A layer of which this rank has its share of the experts, and whose router has chosen already."""
    torch.manual_seed(rank)
    experts = Experts(count // ranks, TOP_K, WIDTH)
    config = DecoderConfig(
        "MIXTRALMOE", 64, SIZE, WIDTH, num_layers=1, num_heads=8, num_kv_heads=8, head_dim=64, experts=experts
    )
    moe = MoE(config, experts, None, None)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    chosen = torch.rand(TOKENS, count).topk(TOP_K).indices
    weights = torch.rand(TOKENS, TOP_K)
    routing = Routing(*(torch.zeros(count) for _ in Routing._fields))
    moe.router.forward = lambda x_BSD: (chosen, weights, torch.ones_like(chosen, dtype=torch.bool), routing)  # type: ignore[method-assign]
    if ranks > 1:
        assert dist.group.WORLD is not None
        moe.run_experts = partial(run_experts, dist.group.WORLD)
    return moe


def passes(moe: MoE, run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    moe.zero_grad()
    x = x.detach().requires_grad_()
    if dist.is_initialized():
        dist.barrier()
    begin = time.perf_counter()
    run(x).sum().backward()
    if dist.is_initialized():
        dist.barrier()
    return time.perf_counter() - begin


def products(moe: MoE, x: Tensor, count: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The grouped products, and the rows for them."""
    chosen = moe.router(x)[0].flatten()
    ends = F.one_hot(chosen, count).sum(0).cumsum(0).int()
    return (lambda rows: moe.experts(rows, ends, True)), x[0][chosen.argsort(stable=True) // TOP_K]


def plain(moe: MoE, x_1TD: Tensor, count: int) -> Tensor:
    """A layer over ranks as one writes it first: one product per expert, uneven all-to-alls, and ``index_add``."""
    chosen, weights, *_ = moe.router(x_1TD)
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=count)
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts)
    sent_to = counts.view(RANKS, -1).sum(1).tolist()
    by_rank = received.view(RANKS, -1)
    got = by_rank.sum(1).tolist()
    rows = x_1TD[0][order // TOP_K]
    arrived = all_to_all_single(rows.new_empty(sum(got), SIZE), rows, got, sent_to)
    parts = [part.split(row.tolist()) for part, row in zip(arrived.split(got), by_rank, strict=True)]
    outs: list[list[Tensor]] = [[] for _ in range(RANKS)]
    for expert in range(count // RANKS):
        mine = torch.cat([part[expert] for part in parts])
        gate, up, down = (linear.weight[expert] for linear in (moe.experts.gate, moe.experts.up, moe.experts.down))
        out = (F.silu(mine @ gate.t()) * (mine @ up.t())) @ down.t()
        for rank, piece in enumerate(out.split([len(part[expert]) for part in parts])):
            outs[rank].append(piece)
    back = all_to_all_single(rows.new_empty(len(rows), SIZE), torch.cat(list(itertools.chain(*outs))), sent_to, got)
    weighted = back * weights.flatten()[order].unsqueeze(1)
    return torch.zeros_like(x_1TD[0]).index_add(0, order // TOP_K, weighted).unsqueeze(0)


def compare(ranks: int, rounds: int, count: int) -> tuple[float, float, float]:
    """Returns our median seconds, theirs, and the median ratio (theirs / ours), of ``count`` experts."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    moe, x = layer(ranks, rank, count), torch.randn(1, TOKENS, SIZE)
    sides: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda x: moe(x)[0], x), products(moe, x, count) if ranks == 1 else (partial(plain, moe, count=count), x)
    ]  # fmt: skip
    if ranks > 1:
        torch.testing.assert_close(sides[0][0](x), sides[1][0](x))
    times = [[passes(moe, run, rows) for run, rows in sides] for _ in range(rounds + 2)][2:]
    ours, theirs = ([pair[side] for pair in times] for side in (0, 1))
    return statistics.median(ours), statistics.median(theirs), statistics.median(t / o for o, t in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="pairs of measurements")
    parser.add_argument("--experts", type=int, default=8, help="number of experts, a multiple of 4")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    line: Any = "{:12} ours {:7.1f} ms   theirs {:7.1f} ms   {}".format
    if a.worker:
        with join() as world:
            ours, theirs, ratio = compare(RANKS, a.rounds, a.experts)
        if world.rank == 0:
            print(line(f"{RANKS} processes", 1e3 * ours, 1e3 * theirs, f"speed {ratio:.2f}x of the plain loop"))
        return
    ours, theirs, ratio = compare(1, a.rounds, a.experts)
    print(line("one process", 1e3 * ours, 1e3 * theirs, f"cost {1 / ratio:.3f}x of the products alone"), flush=True)
    command = [sys.executable, __file__, "--worker", "--rounds", str(a.rounds), "--experts", str(a.experts)]
    print(run_processes(command, RANKS), end="")


if __name__ == "__main__":
    main()
