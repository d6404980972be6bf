"""Training speed of the strategies against PyTorch's own, in one run: ``python benchmarks/parallel.py``.

Two processes with one thread each on gloo train the same model on random tokens. Ours and theirs take their steps in turn,
so that both see the same machine; each round starts new processes. Printed are medians over all steps.

| ours       | theirs                                                                                     |
|------------|--------------------------------------------------------------------------------------------|
| ZeRO-1.5   | DistributedDataParallel and ZeroRedundancyOptimizer over AdamW                              |
| FSDP       | bare fully_shard of every layer and the model, AdamW                                       |
| mtp, msp   | parallelize_module with the column, row and sequence styles, loss_parallel, AdamW          |

Theirs have the same Decoder, gradient clipping and fused AdamW, in fp32.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ours import SHAPES, config_of, options, steps_of, tokens_and_labels
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from turns import serve, speed_ratio, take_turns

from internevo.models.decoder import Decoder
from internevo.models.families.registry import decoder_config
from internevo.parallel.world import join
from internevo.train.process import keep_freed_memory

RANKS = 2
OURS: dict[str, dict[str, Any]] = {
    "zero": {"zero1": {"size": RANKS}},
    "fsdp": {"zero1": {"size": RANKS, "fsdp": True}},
    "mtp": {"tensor": {"size": RANKS, "mode": "mtp"}},
    "msp": {"tensor": {"size": RANKS, "mode": "msp"}},
}
PEERS = {
    "zero": "DDP + ZeroRedundancy",
    "fsdp": "bare fully_shard",
    "mtp": "parallelize_module",
    "msp": "parallelize_module, SP",
}


def plain(shape: dict[str, int]) -> Decoder:
    """The model on one process, for PyTorch's strategies."""
    torch.manual_seed(0)
    model = Decoder(decoder_config("LLAMA2", config_of(shape, "float32").model))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return model


def theirs(which: str, shape: dict[str, int]) -> Iterator[float]:
    """Takes steps of PyTorch's strategy, and yields the seconds of each."""
    decoder = plain(shape)
    model: nn.Module = decoder
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    if which == "zero":
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        optimizer: Any = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-4, fused=True)
    elif which == "fsdp":
        for _, layer in decoder.numbered_layers():
            fully_shard(layer)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    else:
        tensor_parallel(decoder, which == "msp")
        around = loss_parallel
        groups = [{"params": kind} for kind in kinds(list(model.parameters()))]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    while True:
        tokens, labels = tokens_and_labels(shape)
        begin = time.perf_counter()
        with around():
            (model(tokens, labels=labels).total / labels.numel()).backward()
        clip(list(model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        yield time.perf_counter() - begin


def kinds(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """DTensors and plain ones apart: PyTorch's functions over many tensors take one kind at a time."""
    found = [[p for p in parameters if isinstance(p, DTensor) == cut] for cut in (True, False)]
    return [kind for kind in found if kind]


def clip(parameters: list[nn.Parameter]) -> None:
    """To a norm of 1, as PyTorch does it."""
    norms = [nn.utils.get_total_norm([p.grad for p in kind]) for kind in kinds(parameters)]  # type: ignore[misc]
    total = torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]).norm()
    for kind in kinds(parameters):
        nn.utils.clip_grads_with_norm_(kind, 1.0, total)


def tensor_parallel(model: Decoder, sequence: bool) -> None:
    """PyTorch's plan, as its tensor parallel tutorial has it; logits and loss stay cut along the vocabulary."""
    mesh = init_device_mesh("cpu", (RANKS,))
    outside = Shard(1) if sequence else Replicate()
    for _, layer in model.numbered_layers():
        plan: dict[str, Any] = {f"attn.{name}": ColwiseParallel() for name in "qkv"}
        plan |= {"mlp.gate": ColwiseParallel(), "mlp.up": ColwiseParallel()}
        plan |= {name: RowwiseParallel(output_layouts=outside) for name in ("attn.o", "mlp.down")}
        if sequence:
            plan |= {name: SequenceParallel(use_local_output=False) for name in ("attn_norm", "mlp_norm")}
            plan |= {
                "attn": PrepareModuleInput(
                    input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
                ),
                "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
            }
        parallelize_module(layer, mesh, plan)
    embed, norm, head = model.embed, model.norm, model.head
    assert embed is not None and norm is not None and head is not None
    for end in (embed, head):
        end.weight = nn.Parameter(distribute_tensor(end.weight.data, mesh, [Shard(0)]))

    def look_up(tokens_BS: Tensor, weight_VD: Tensor) -> Tensor:
        found = F.embedding(DTensor.from_local(tokens_BS, mesh, [Replicate()]), weight_VD)
        return cast(DTensor, found).redistribute(mesh, [outside]).to_local()

    def loss(
        x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, smoothing: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        whole = DTensor.from_local(x_BSD, mesh, [outside]).redistribute(mesh, [Replicate()])
        logits = F.linear(whole, weight_VD).flatten(0, 1).float()
        labels = DTensor.from_local(labels_BS.flatten(), mesh, [Replicate()])
        mean = F.cross_entropy(logits, labels, reduction="mean")
        return (mean.to_local() if isinstance(mean, DTensor) else mean) * labels_BS.numel(), labels_BS

    if sequence:
        parallelize_module(norm, mesh, SequenceParallel(use_local_output=True))
    embed.look_up, head.loss = look_up, loss


def work(which: str, side: str, shape: str) -> None:
    """Serves the steps of one side."""
    if side == "ours":
        with join() as world:
            serve(steps_of(world, SHAPES[shape], "float32", parallel=OURS[which]))
    else:
        keep_freed_memory()  # as ours do
        dist.init_process_group("gloo")
        serve(theirs(which, SHAPES[shape]))
        dist.destroy_process_group()


def main() -> None:
    parser = options(__doc__, ["M"], steps=4, rounds=3)
    parser.add_argument("--strategies", nargs="+", default=list(OURS), choices=list(OURS))
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        which, side = a.worker
        work(which, side, a.shapes[0])
        return
    lines = [f"{'shape':6}{'ours':6}{'theirs':26}{'s/step':>8}{'theirs':>8}{'speed ratio':>13}"]
    for shape, which in itertools.product(a.shapes, a.strategies):
        mine, peer, ratio = compare(which, shape, a.steps, a.rounds)
        lines.append(f"{shape:6}{which:6}{PEERS[which]:26}{mine:8.3f}{peer:8.3f}{ratio:13.2f}")
    print("\n".join(lines))


def compare(which: str, shape: str, steps: int, rounds: int) -> tuple[float, float, float]:
    """Measures both, and prints each round. Returns the medians over all steps of ours, theirs, and the ratio of the speeds."""
    found: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(1, rounds + 1):
        times, _ = take_turns({side: command(which, side, shape) for side in found}, steps, RANKS)
        mine, peer = (statistics.median(side) for side in times.values())
        ratio = speed_ratio(times, "ours", "theirs")
        print(f"round {number}: {shape} {which}: {mine:.3f} s/step, {PEERS[which]}: {peer:.3f}: {ratio:.2f}", flush=True)
        for side, of_round in times.items():
            found[side] += of_round
    mine, peer = (statistics.median(side) for side in found.values())
    return mine, peer, speed_ratio(found, "ours", "theirs")


def command(which: str, side: str, shape: str) -> list[str]:
    """The command of one rank of one side."""
    return [sys.executable, __file__, "--worker", which, side, "--shapes", shape]


if __name__ == "__main__":
    main()
