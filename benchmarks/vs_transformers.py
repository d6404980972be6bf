"""Training speed and memory against transformers, in one run: ``python benchmarks/vs_transformers.py``.

Each measurement is a process of its own that trains a few steps on random tokens; ours and theirs take turns, so that both
see the same machine. Printed are medians over the rounds, and their ratios.

- theirs: ``LlamaForCausalLM`` in a plain loop with fused AdamW and gradient clipping; bf16 is autocast over fp32 weights.
- ours: the program's own step (model, chunked loss, sharding policy, clipping, AdamW) as ``internevo train`` runs it;
  bf16 computes in bf16 with fp32 master weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "S": {"layers": 6, "hidden": 384, "mlp": 1024, "heads": 6, "kv": 6, "vocab": 8192, "rows": 4, "seq": 512},
    "M": {"layers": 8, "hidden": 768, "mlp": 2048, "heads": 12, "kv": 4, "vocab": 32000, "rows": 2, "seq": 1024},
}


def theirs(shape: dict[str, int], dtype: str, steps: int) -> list[float]:
    """Seconds per step of transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape["vocab"], hidden_size=shape["hidden"], intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["kv"],
        max_position_embeddings=shape["seq"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    times = []
    for _ in range(steps):
        tokens = torch.randint(0, shape["vocab"], (shape["rows"], shape["seq"]))
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begin)
    return times


def ours(shape: dict[str, int], dtype: str, steps: int, compiled: bool) -> list[float]:
    """Seconds per step of this program."""
    import torch
    import torch.distributed as dist

    from internevo.config import validate
    from internevo.data.batches import Cursor, MicroBatch, StepBatch
    from internevo.models import LossTerms, decoder_config
    from internevo.parallel import plan
    from internevo.parallel.layout import Layout
    from internevo.parallel.world import join
    from internevo.train.optimizer import Optimizer
    from internevo.train.scaler import LossScaler
    from internevo.train.step import Stepper

    config = validate({
        "model_type": "LLAMA2",
        "model": {
            "num_layers": shape["layers"], "hidden_size": shape["hidden"], "intermediate_size": shape["mlp"],
            "num_attention_heads": shape["heads"], "num_kv_attention_heads": shape["kv"], "vocab_size": shape["vocab"],
            "dtype": dtype, "compile": compiled,
        },
        "data": {"seq_len": shape["seq"], "micro_bsz": shape["rows"], "total_steps": steps},
        "adam": {"lr": 1e-4},
    })  # fmt: skip
    times = []
    with join() as world:
        layout = Layout.of(config.parallel, world.size)
        model, axis = plan.build(
            decoder_config("LLAMA2", config.model), config.model, config.parallel, layout, world.device, seed=0
        )
        optimizer = Optimizer(axis.masters, config.adam)
        scaler = LossScaler.of(config.grad_scaler, config.model.dtype)
        assert dist.group.WORLD is not None
        stepper = Stepper(
            model, axis, optimizer, scaler, layout, dist.group.WORLD, world.device, types=1, clip=1.0, terms=LossTerms()
        )
        for number in range(steps):
            tokens = torch.randint(0, shape["vocab"], (shape["rows"], shape["seq"]))
            labels = torch.cat([tokens[:, 1:], torch.full((shape["rows"], 1), -100)], dim=1)
            micro = MicroBatch(tokens, labels, torch.zeros_like(tokens), None)
            batch = StepBatch([micro], number, Cursor(), tokens.numel())
            begin = time.perf_counter()
            stepper(batch, 1e-4, 0.95, lambda: [0.0])
            times.append(time.perf_counter() - begin)
    return times


def measure(which: str, shape: str, dtype: str, steps: int, threads: int) -> dict[str, Any]:
    """Runs one measurement in a process of its own."""
    command = [sys.executable, __file__, "--worker", which, "--shapes", shape, "--dtypes", dtype, "--steps", str(steps)]
    import os

    out = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if out.returncode:
        raise SystemExit(f"{which} {shape} {dtype} failed:\n{out.stderr[-3000:]}")
    return json.loads(out.stdout.splitlines()[-1])


def worker(which: str, shape: str, dtype: str, steps: int) -> None:
    """Prints tokens per second (median step, the first two left out) and peak memory in GB."""
    sizes = SHAPES[shape]
    times = theirs(sizes, dtype, steps) if which == "theirs" else ours(sizes, dtype, steps, which == "compiled")
    speed = sizes["rows"] * sizes["seq"] / statistics.median(times[2:])
    print(json.dumps({"speed": speed, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["S", "M"], choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", choices=["theirs", "eager", "compiled"], help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        worker(a.worker, a.shapes[0], a.dtypes[0], a.steps)
        return
    print(f"{'shape':6}{'dtype':6}{'':10}{'tokens/s':>10}{'ratio':>8}{'GB':>8}{'ratio':>8}")
    for shape in a.shapes:
        for dtype in a.dtypes:
            found: dict[str, list[dict[str, Any]]] = {w: [] for w in ("theirs", "eager", "compiled")}
            for _ in range(a.rounds):
                for which, rows in found.items():
                    rows.append(measure(which, shape, dtype, a.steps, a.threads))
            base = found["theirs"]
            for which, rows in found.items():
                speed, memory = (statistics.median(r[k] for r in rows) for k in ("speed", "memory"))
                ratios = [statistics.median(r[k] / b[k] for r, b in zip(rows, base, strict=True)) for k in ("speed", "memory")]
                name = "transformers" if which == "theirs" else which
                print(f"{shape:6}{dtype:6}{name:12}{speed:8.0f}{ratios[0]:8.2f}{memory:8.2f}{ratios[1]:8.2f}", flush=True)


if __name__ == "__main__":
    main()
