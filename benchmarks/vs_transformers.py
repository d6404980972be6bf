"""Training speed and memory against transformers, in one run: ``python benchmarks/vs_transformers.py``.

Each measurement is a process of its own that trains a few steps on random tokens, on a GPU if there is one (``--shapes 1B``
is for those); ours and theirs take turns, so that both see the same machine. Printed are medians over the rounds, and their
ratios.

- theirs: ``LlamaForCausalLM`` in a plain loop with fused AdamW and gradient clipping; bf16 is autocast over fp32 weights.
- ours: the program's own step (model, chunked loss, sharding policy, clipping, AdamW) as ``internevo train`` runs it;
  bf16 computes in bf16 with fp32 master weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from ours import SHAPES, finish, options, train

from internevo.observe.record import memory_peak
from internevo.ops.precision import is_slow
from internevo.parallel.world import join, pick_device

NAMES = {"theirs": "transformers", "eager": "eager", "compiled": "compiled"}


def theirs(shape: dict[str, int], dtype: str, steps: int, micro_batches: int = 1) -> list[float]:
    """Seconds per step of transformers."""
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
    times = []
    for _ in range(steps):
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
        times.append(time.perf_counter() - begin)
    return times


def ours(shape: dict[str, int], dtype: str, steps: int, compiled: bool) -> list[float]:
    """Seconds per step of this program."""
    with join() as world:
        return train(world, shape, dtype, steps, compiled)


def measure(which: str, shape: str, dtype: str, steps: int, threads: int) -> dict[str, Any]:
    """Runs one measurement in a process of its own."""
    command = [sys.executable, __file__, "--worker", which, "--shapes", shape, "--dtypes", dtype, "--steps", str(steps)]
    out = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if out.returncode:
        raise SystemExit(f"{which} {shape} {dtype} failed:\n{out.stderr[-3000:]}")
    return json.loads(out.stdout.splitlines()[-1])


def worker(which: str, shape: str, dtype: str, steps: int) -> None:
    """Prints tokens per second (median step, the first two left out) and peak memory in GB."""
    sizes = SHAPES[shape]
    times = theirs(sizes, dtype, steps) if which == "theirs" else ours(sizes, dtype, steps, which == "compiled")
    speed = sizes["rows"] * sizes["seq"] / statistics.median(times[2:])
    print(json.dumps({"speed": speed, "memory": memory_peak(pick_device(0)) / 1e9}))


def main() -> None:
    parser = options(__doc__, ["S", "M"], steps=8, rounds=3)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", choices=["theirs", "eager", "compiled"], help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        worker(a.worker, a.shapes[0], a.dtypes[0], a.steps)
        return
    lines = [f"{'shape':6}{'dtype':6}{'':10}{'tokens/s':>10}{'ratio':>8}{'GB':>8}{'ratio':>8}"]
    for shape, dtype in itertools.product(a.shapes, possible(a.dtypes)):
        found = compare(shape, dtype, a.steps, a.rounds, a.threads)
        for which, rows in found.items():
            speed, memory = (statistics.median(row[key] for row in rows) for key in ("speed", "memory"))
            ratios = [ratio(found, which, key) for key in ("speed", "memory")]
            lines.append(f"{shape:6}{dtype:6}{NAMES[which]:12}{speed:8.0f}{ratios[0]:8.2f}{memory:8.2f}{ratios[1]:8.2f}")
    print("\n".join(lines))


def possible(dtypes: list[str]) -> list[str]:
    """Leaves out bf16 on a CPU that has no instructions for it, and says so: it would take hundreds of times as long."""
    if "bf16" in dtypes and is_slow("bfloat16", pick_device(0)):
        print("bf16 is left out: this CPU has no instructions for it", flush=True)
        return [dtype for dtype in dtypes if dtype != "bf16"]
    return dtypes


def compare(shape: str, dtype: str, steps: int, rounds: int, threads: int) -> dict[str, list[dict[str, float]]]:
    """Measures all in turns, and prints each measurement. Returns those of all rounds."""
    found: dict[str, list[dict[str, float]]] = {which: [] for which in NAMES}
    for number in range(1, rounds + 1):
        for which, rows in found.items():
            rows.append(measure(which, shape, dtype, steps, threads))
            now = rows[-1]
            print(
                f"round {number}: {shape} {dtype} {NAMES[which]}: {now['speed']:.0f} tokens/s, {now['memory']:.2f} GB",
                flush=True,
            )
    return found


def ratio(found: dict[str, list[dict[str, float]]], which: str, key: str) -> float:
    """The median over the rounds of the ratio to transformers."""
    return statistics.median(row[key] / base[key] for row, base in zip(found[which], found["theirs"], strict=True))


if __name__ == "__main__":
    main()
