"""What one GPU does: ``python benchmarks/gpu.py`` prints one table last, and leaves a profile in ``--out``.

Every measurement is a process of its own, so that each has the card's memory to itself:

- the card: a large product in bf16, and a copy;
- kernels: norms, gates, attention of packed documents and the loss, in the forms that there are;
- the training step of ``internevo train`` on packed documents, eager and compiled, with a profile by part;
- the same model in a plain PyTorch loop, compiled as a whole.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ours import SHAPES, config_of, finish
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from internevo import ops
from internevo.config import Config, validate
from internevo.data.batches import Cursor, StepBatch, TrainBatches
from internevo.models.decoder import Decoder
from internevo.parallel.world import join
from internevo.train.parts import Parts
from internevo.train.shared import Shared
from internevo.train.step import Stepper

MICRO_BATCHES = 2
GPU = torch.device("cuda")
PARTS = {
    "attention": ("flash", "fmha", "attention"),
    "products": ("gemm", "cutlass", "nvjet", "sm90_xmma", "cublas"),
    "optimizer": ("adam", "multi_tensor_apply"),
    "copies": ("memcpy", "memset", "copy_kernel", "_to_copy"),
}
"""Kernels by words in their names, the first that fits."""
OTHERS = "norms, gates, rotary, loss"


def seconds(work: Callable[[], Any], repeats: int = 10) -> float:
    """Of one call: the median of ``repeats``, after three."""
    times = []
    for number in range(repeats + 3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def card() -> dict[str, float]:
    """TFLOPS of a large product, and TB/s of a copy (bytes read and written)."""
    a, b = (torch.randn(8192, 8192, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    big = torch.empty(2**31, device=GPU, dtype=torch.uint8)
    return {"product TFLOPS": 2 * 8192**3 / seconds(lambda: a @ b) / 1e12, "copy TB/s": 2 * 2**31 / seconds(big.clone) / 1e12}


def kernels() -> dict[str, float]:
    """Microseconds forward and backward, at the shape 1B (8,192 tokens)."""
    shape, found = SHAPES["1B"], dict[str, float]()
    tokens, d, f = shape["rows"] * shape["seq"], shape["hidden"], shape["mlp"]

    def time_of(name: str, function: Any, *inputs: Tensor) -> None:
        outs = function(*inputs)
        grad = torch.randn_like(outs)
        found[f"{name}: forward"] = 1e6 * seconds(lambda: function(*inputs))
        wanted = [given for given in inputs if given.requires_grad]
        found[f"{name}: both"] = 1e6 * seconds(lambda: torch.autograd.grad(function(*inputs), wanted, grad))

    def leaf(*size: int) -> Tensor:
        return torch.randn(*size, device=GPU, dtype=torch.bfloat16, requires_grad=True)

    x, weight = leaf(tokens, d), leaf(d)
    time_of("norm, ours", lambda x, w: ops.rms_norm(x, w, 1e-5), x, weight)
    time_of("norm, F.rms_norm", lambda x, w: F.rms_norm(x, (d,), w, 1e-5), x, weight)
    time_of("norm, compiled", torch.compile(plain_norm), x, weight)
    gate, up = leaf(tokens, f), leaf(tokens, f)
    time_of("gate, ours", ops.gated, gate, up)
    time_of("gate, plain", plain_gate, gate, up)
    time_of("gate, compiled", torch.compile(plain_gate), gate, up)
    heads, kv, n = shape["heads"], shape["kv"], d // shape["heads"]
    q, k, v = leaf(1, tokens, heads, n), leaf(1, tokens, kv, n), leaf(1, tokens, kv, n)
    boundaries = torch.arange(0, tokens + 1, 1024, dtype=torch.int32, device=GPU)
    time_of("attention of documents of 1,024", lambda q, k, v: ops.attention(q, k, v, boundaries, 1024), q, k, v)
    whole = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32, device=GPU)
    time_of("attention of documents of 4,096", lambda q, k, v: ops.attention(q, k, v, whole, 4096), q, k, v)
    head, labels = leaf(shape["vocab"], d), torch.randint(0, shape["vocab"], (tokens,), device=GPU)
    time_of("loss, ours", lambda x, w: ops.linear_cross_entropy(x, w, labels)[0], x, head)
    time_of("loss, compiled logits", torch.compile(plain_loss), x, head, labels)
    return found


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As a compiler likes it."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def plain_gate(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's."""
    return F.silu(gate) * up


def plain_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """With all logits at once."""
    return F.cross_entropy((x @ weight.t()).float(), labels)


def packed(shape: dict[str, int], compiled: bool) -> Config:
    """A config of packed documents of random lengths."""
    values = config_of(shape, "bf16", 100, compiled).model_dump(exclude_unset=True)
    values["data"] |= {"fixed_random_dataset_seqlen": False, "micro_num": MICRO_BATCHES}
    return validate(values)


def step(shape: dict[str, int], compiled: bool, steps: int, out: Path) -> dict[str, float]:
    """The training step; and the shares of its parts in a profile."""
    config = packed(shape, compiled)
    with join() as world:
        parts = Parts.build(config, world)
        stepper = Stepper(parts)
        batches = TrainBatches(parts.source, parts.sizes, 0, True, 100, pin_memory=True).iterate(Cursor())
        times = [take(stepper, next(batches)) for _ in range(steps)]
        batch = next(batches)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            profiled = take(stepper, batch)
        name = "compiled" if compiled else "eager"
        profiler.export_chrome_trace(str(out / f"step-{name}.json.gz"))
        (out / f"step-{name}.txt").write_text(profiler.key_averages().table(sort_by="self_device_time_total", row_limit=60))
        found = speed(config, parts.decoder.flops_per_token(shape["seq"]), times[3:])
        return {**found, **{f"ms of {part}": ms for part, ms in by_part(profiler)}, "ms of the step": 1e3 * profiled}


def take(stepper: Stepper, batch: StepBatch) -> float:
    """One step; its seconds."""
    begin = time.perf_counter()
    stepper(batch, 1e-4, 0.95, lambda: Shared(0.0, 0.0, 0.0, 0.0, [0.0]))
    finish(GPU)
    return time.perf_counter() - begin


def by_part(profiler: Any) -> Iterator[tuple[str, float]]:
    """Milliseconds of the GPU's kernels, by part."""
    totals: dict[str, float] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.name.lower()
            part = next(
                (part for part, words in PARTS.items() if any(word in name for word in words)), "norms, gates, rotary, loss"
            )
            totals[part] = totals.get(part, 0.0) + event.device_time / 1e3
    yield from sorted(totals.items())


def plain_loop(shape: dict[str, int], steps: int) -> dict[str, float]:
    """The same model on whole rows, compiled as a whole, bf16 autocast over fp32 weights, fused AdamW."""
    from internevo.models.families.registry import decoder_config

    config = packed(shape, True)
    decoder = decoder_config("LLAMA2", config.model)
    with torch.device(GPU):
        model = Decoder(decoder)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    size = (shape["rows"], shape["seq"])

    @torch.compile
    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return F.cross_entropy(model(tokens).flatten(0, 1).float(), labels.flatten())

    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        for _ in range(MICRO_BATCHES):
            tokens, labels = (torch.randint(0, shape["vocab"], size, device=GPU) for _ in range(2))
            (loss_of(tokens, labels) / MICRO_BATCHES).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        finish(GPU)
        times.append(time.perf_counter() - begin)
    return speed(config, decoder.flops_per_token(shape["seq"]), times[3:])


def speed(config: Config, flops: float, times: list[float]) -> dict[str, float]:
    """Tokens per second, TFLOPS by the model's FLOPs, and peak memory."""
    tokens = config.data.seq_len * config.data.micro_bsz * MICRO_BATCHES / statistics.median(times)
    return {"tokens/s": tokens, "TFLOPS": tokens * flops / 1e12, "GB": torch.cuda.max_memory_allocated() / 1e9}


def measure(name: str, shape: str, steps: int, out: Path) -> dict[str, float]:
    """One measurement, in a process of its own; empty when it failed."""
    command = [sys.executable, __file__, "--only", name, "--shape", shape, "--steps", str(steps), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{name} failed:\n{done.stderr[-2000:]}", flush=True)
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1B", choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--only", choices=["card", "kernels", "eager", "compiled", "plain loop"])
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[a.shape]
    work: dict[str, Callable[[], dict[str, float]]] = {
        "card": card, "kernels": kernels, "eager": lambda: step(shape, False, a.steps, a.out),
        "compiled": lambda: step(shape, True, a.steps, a.out), "plain loop": lambda: plain_loop(shape, a.steps),
    }  # fmt: skip
    if a.only:
        print(json.dumps(work[a.only]()))
        return
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, shape {a.shape}")
    found = {name: measure(name, a.shape, a.steps, a.out) for name in work}
    (a.out / "gpu.json").write_text(json.dumps(found, indent=1))
    for name, values in found.items():
        for key, value in values.items():
            print(f"{name:12}{key:44}{value:12.1f}")


if __name__ == "__main__":
    main()
