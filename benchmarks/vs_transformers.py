"""Training speed and memory against transformers, in one run: ``python benchmarks/vs_transformers.py``.

Each program is a process of its own that trains on random tokens. They take their steps in turn, so that all see the same
machine; each round starts new processes. On a GPU (``--shapes 1B``), which is not shared, one runs after the other, because its
memory may not be enough for all. Printed are medians over all steps, and of the ratios of the steps of a turn.

- theirs: ``LlamaForCausalLM`` in a plain loop with fused AdamW and gradient clipping; bf16 is autocast over fp32 weights.
- ours: the program's own step (model, chunked loss, sharding policy, clipping, AdamW) as ``internevo train`` runs it;
  bf16 computes in bf16 with fp32 master weights.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator

import torch
from ours import SHAPES, finish, options, steps_of
from turns import serve, speed_ratio, take_turns

from internevo.ops.precision import is_slow
from internevo.parallel.world import join, pick_device

NAMES = {"theirs": "transformers", "eager": "eager", "compiled": "compiled"}


def theirs(shape: dict[str, int], dtype: str, micro_batches: int = 1) -> Iterator[float]:
    """Takes steps of transformers, and yields the seconds of each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape["vocab"], hidden_size=shape["hidden"], intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["kv"],
        max_position_embeddings=shape["seq"],
    )  # fmt: skip
    torch.manual_seed(0)
    device = pick_device(0)
    model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, device)  # transformers' own has no types
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    while True:
        batches = [torch.randint(0, shape["vocab"], (shape["rows"], shape["seq"])) for _ in range(micro_batches)]
        begin = time.perf_counter()
        for batch in batches:
            tokens = batch.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            (loss / micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        finish(device)
        yield time.perf_counter() - begin


def worker(which: str, shape: str, dtype: str) -> None:
    """Serves the steps of one program."""
    if which == "theirs":
        serve(theirs(SHAPES[shape], dtype))
        return
    with join() as world:
        serve(steps_of(world, SHAPES[shape], dtype, which == "compiled"))


def main() -> None:
    parser = options(__doc__, ["S", "M"], steps=5, rounds=3)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", choices=["theirs", "eager", "compiled"], help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        worker(a.worker, a.shapes[0], a.dtypes[0])
        return
    lines = [f"{'shape':6}{'dtype':6}{'':10}{'tokens/s':>10}{'ratio':>8}{'GB':>8}{'ratio':>8}"]
    for shape, dtype in itertools.product(a.shapes, possible(a.dtypes)):
        times, memory = compare(shape, dtype, a.steps, a.rounds, a.threads)
        for which, name in NAMES.items():
            speed, ratio = speed_of(shape, times[which]), speed_ratio(times, which, "theirs")
            share = memory[which] / memory["theirs"]
            lines.append(f"{shape:6}{dtype:6}{name:12}{speed:8.0f}{ratio:8.2f}{memory[which]:8.2f}{share:8.2f}")
    print("\n".join(lines))


def possible(dtypes: list[str]) -> list[str]:
    """Leaves out bf16 on a CPU that has no instructions for it, and says so: it would take hundreds of times as long."""
    if "bf16" in dtypes and is_slow("bfloat16", pick_device(0)):
        print("bf16 is left out: this CPU has no instructions for it", flush=True)
        return [dtype for dtype in dtypes if dtype != "bf16"]
    return dtypes


def compare(shape: str, dtype: str, steps: int, rounds: int, threads: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Measures all, and prints each round.

    Returns:
        Program -> the seconds of all steps; program -> median of its peak memory in GB.
    """
    times: dict[str, list[float]] = {which: [] for which in NAMES}
    memory: dict[str, list[float]] = {which: [] for which in NAMES}
    alone = pick_device(0).type != "cpu"
    for number in range(1, rounds + 1):
        for together in [[which] for which in NAMES] if alone else [list(NAMES)]:
            found, peaks = take_turns({which: command(which, shape, dtype) for which in together}, steps, threads=threads)
            for which, of_round in found.items():
                times[which] += of_round
                memory[which].append(peaks[which])
                result = f"{speed_of(shape, of_round):.0f} tokens/s, {peaks[which]:.2f} GB"
                print(f"round {number}: {shape} {dtype} {NAMES[which]}: {result}", flush=True)
    return times, {which: statistics.median(found) for which, found in memory.items()}


def command(which: str, shape: str, dtype: str) -> list[str]:
    """The command of one program."""
    return [sys.executable, __file__, "--worker", which, "--shapes", shape, "--dtypes", dtype]


def speed_of(shape: str, times: list[float]) -> float:
    """Tokens per second of the median step."""
    return SHAPES[shape]["rows"] * SHAPES[shape]["seq"] / statistics.median(times)


if __name__ == "__main__":
    main()
