"""What one GPU does: ``python benchmarks/gpu.py`` prints one table last, and leaves a profile in ``--out``.

Every measurement is a process of its own, so that each has the card's memory to itself:

- card: a large product in bf16, and a copy;
- kernels: norms, gates, attention of packed documents and the loss, in the forms that there are;
- eager, compiled: the training step of ``internevo train`` on packed documents. A profile gives the time of kernels by
  part, and next to it the least time that the part could take on this card;
- experts: as compiled, with 8 experts of half the MLP's width, of which each token chooses 2: as many active parameters;
- muon: as compiled, with Muon in place of AdamW;
- flash 3, flash 4: as compiled, with this generation of flash attention (if its package is installed);
- plain loop: the same model in a plain PyTorch loop, compiled as a whole;
- transformers, liger: ``LlamaForCausalLM`` with its best attention, and patched by Liger (if that is installed).

All of it takes about 5 minutes on an H200; ``--only compiled`` less than one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ours import SHAPES, config_of, finish, options
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from internevo import ops
from internevo.config import Config, validate
from internevo.data.batches import Cursor, StepBatch, TrainBatches
from internevo.models.config import DecoderConfig
from internevo.models.decoder import Decoder
from internevo.parallel.world import join
from internevo.train.parts import Parts
from internevo.train.process import prepare
from internevo.train.shared import Shared
from internevo.train.step import Stepper

MICRO_BATCHES = 2
FIRST = 4
"""Number of steps before the clock starts."""
GPU = torch.device("cuda")
FLASH = {"flash 3": 3, "flash 4": 4}
STEPS = ("eager", "compiled", "experts", "muon", *FLASH)
"""The program's own step, in these ways."""
PARTS = {
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "products": ("gemm", "cutlass", "nvjet", "xmma", "cublas"),
    "optimizer": ("adam",),
    "norm of the gradients": ("lpnorm",),
    "gradients into fp32": ("accumulate", "functor_add<float>", "direct_copy_kernel"),
    "loss": ("softmax", "logsumexp", "scatter", "log_lt"),
    "norms, residual stream": ("norm", "gammabeta"),
    "gates": ("silu", "gelu"),
    "rotary embedding": ("_cat_", "sin", "cos"),
    "copies": ("memcpy", "memset", "copy", "multi_tensor_apply"),
}
"""Kernels by words in their names, the first that fits."""
OTHERS, GAPS = "others", "the GPU waits for the host"


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
        wanted = [given for given in inputs if given.requires_grad]
        found[f"{name}: forward"] = 1e6 * seconds(lambda: function(*inputs))
        found[f"{name}: both"] = 1e6 * seconds(lambda: torch.autograd.grad(function(*inputs), wanted, grad))

    def leaf(*size: int) -> Tensor:
        return torch.randn(*size, device=GPU, dtype=torch.bfloat16, requires_grad=True)

    x, weight = leaf(tokens, d), leaf(d)
    time_of("norm, ours", lambda x, w: ops.rms_norm(x, w, 1e-5), x, weight)
    time_of("norm, compiled", torch.compile(plain_norm), x, weight)
    gate, up = leaf(tokens, f), leaf(tokens, f)
    time_of("gate, ours", ops.gated, gate, up)
    time_of("gate, compiled", torch.compile(plain_gate), gate, up)
    for heads, kv, n in ((shape["heads"], shape["kv"], d // shape["heads"]), (32, 8, 128)):
        q, k, v = leaf(1, tokens, heads, n), leaf(1, tokens, kv, n), leaf(1, tokens, kv, n)
        for length in (512, 4096):
            boundaries = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=GPU)
            function = partial(ops.attention, cu_seqlens=boundaries, max_seqlen=length)
            time_of(f"attention, {heads} heads of {n}, documents of {length:,}", function, q, k, v)
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


def packed(shape: dict[str, int], name: str) -> Config:
    """A config of packed documents of random lengths."""
    values = config_of(shape, "bf16", name != "eager").model_dump(exclude_unset=True)
    values["data"] |= {"fixed_random_dataset_seqlen": False, "micro_num": MICRO_BATCHES}
    if name in FLASH:
        values["model"]["flash_attention"] = FLASH[name]
    if name == "muon":
        values["muon"] = {}
    if name == "experts":
        values["model_type"] = "MIXTRALMOE"
        values["model"] |= {
            "num_experts": 8, "top_k": 2, "moe_intermediate_size": shape["mlp"] // 2, "moe_type": "Dropless",
        }  # fmt: skip
    return validate(values)


def step(shape: dict[str, int], name: str, steps: int, out: Path) -> dict[str, float]:
    """The training step; and its parts in a profile, with the least time of each.

    Args:
        name: one of ``STEPS``.
    """
    config = packed(shape, name)
    with join() as world:
        prepare(config, world.device)
        parts = Parts.build(config, world)
        stepper = Stepper(parts)
        batches = iter(TrainBatches(parts.source, parts.sizes, 0, True, 100, pin_memory=GPU.type == "cuda").prefetch(Cursor()))
        losses = []

        def take(batch: StepBatch) -> None:
            result = stepper(batch, 1e-4, 0.95, lambda: Shared(0.0, 0.0, 0.0, 0.0, [0.0]))
            losses.append(result.losses.mean())

        seconds_per_step = clock(lambda: take(next(batches)), steps)
        batch = next(batches)
        finish(GPU)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            take(batch)
            finish(GPU)
        profiler.export_chrome_trace(str(out / f"step-{name}.json.gz"))
        (out / f"step-{name}.txt").write_text(profiler.key_averages().table(sort_by="self_device_time_total", row_limit=60))
        found = speed(config, parts.decoder, seconds_per_step)
        least = floors(parts.decoder, batch, card()) if name != "experts" else {}
        for part, ms in by_part(profiler):
            found[f"ms of {part}"] = ms
            found |= {f"least ms of {part}": least[part]} if part in least else {}
        return {**found, "last loss": losses[-1]}


def clock(take: Callable[[], None], steps: int) -> float:
    """Seconds per step, without waiting for the GPU after each, like ``internevo train``."""
    for _ in range(FIRST):
        take()
    finish(GPU)
    begin = time.perf_counter()
    for _ in range(steps - FIRST):
        take()
    finish(GPU)
    return (time.perf_counter() - begin) / (steps - FIRST)


def by_part(profiler: Any) -> Iterator[tuple[str, float]]:
    """Milliseconds of the GPU's kernels by part, and of the gaps between kernels."""
    totals, spans = dict[str, float](), []
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.name != "Command Buffer Full":
            name = event.name.lower()
            part = next((part for part, words in PARTS.items() if any(word in name for word in words)), OTHERS)
            totals[part] = totals.get(part, 0.0) + event.device_time / 1e3
            spans.append((event.time_range.start, event.time_range.end))
    spans.sort()
    ends = itertools.accumulate((end for _, end in spans), max)
    totals[GAPS] = sum(max(0.0, after - end) for end, (after, _) in zip(ends, spans[1:], strict=False)) / 1e3
    yield from ((part, totals[part]) for part in (*PARTS, OTHERS, GAPS) if part in totals)


def floors(config: DecoderConfig, batch: StepBatch, measured: dict[str, float]) -> dict[str, float]:
    """Milliseconds that each part takes at least on this card, for FLOPs at the speed of a large product, and for bytes at that
    of a copy, if each input is read once and each result written once."""
    flops, bandwidth = measured["product TFLOPS"] * 1e9, measured["copy TB/s"] * 1e9
    micros = [m for m in batch.micro_batches if m.cu_seqlens is not None]
    weights, tokens, layers = config.parameters(), batch.tokens, config.num_layers
    squares = sum(float(m.cu_seqlens.diff().double().square().sum()) for m in micros if m.cu_seqlens is not None)
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    d, f, half = config.hidden_size, config.intermediate_size, 2 * tokens / bandwidth
    return {
        # 2 products of 2 FLOPs forward and 5 backward, on half of the square
        "attention": 7 * layers * heads * squares / flops,
        "products": 6 * (weights - config.vocab_size * d) * tokens / flops,
        "optimizer": 30 * weights / bandwidth,
        "norm of the gradients": 4 * weights / bandwidth,
        "gradients into fp32": (6 + 10 * (len(micros) - 1)) * weights / bandwidth,
        "loss": 2 * config.vocab_size * half,
        # forward: reads the stream and what is added to it, writes both; backward: reads three, writes one
        "norms, residual stream": 8 * 2 * layers * d * half,
        "gates": 8 * layers * f * half,
        "rotary embedding": 4 * layers * (heads + kv) * half,
    }


def plain_loop(shape: dict[str, int], steps: int) -> dict[str, float]:
    """The same model on whole rows, compiled as a whole, bf16 autocast over fp32 weights, fused AdamW."""
    from internevo.models.families.registry import decoder_config

    config = packed(shape, "compiled")
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

    def take() -> None:
        for _ in range(MICRO_BATCHES):
            tokens, labels = (torch.randint(0, shape["vocab"], size, device=GPU) for _ in range(2))
            (loss_of(tokens, labels) / MICRO_BATCHES).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return speed(config, decoder, clock(take, steps))


def transformers(shape: dict[str, int], steps: int, liger: bool) -> dict[str, float]:
    """The plain loop of ``vs_transformers.py``, with as many micro-batches."""
    from vs_transformers import theirs

    from internevo.models.families.registry import decoder_config

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    config = packed(shape, "eager")
    times = list(itertools.islice(theirs(shape, "bf16", MICRO_BATCHES), steps))
    return speed(config, decoder_config("LLAMA2", config.model), statistics.median(times[FIRST:]))


def speed(config: Config, decoder: DecoderConfig, seconds_per_step: float) -> dict[str, float]:
    """Tokens per second, TFLOPS by the model's FLOPs, and peak memory."""
    tokens = config.data.seq_len * config.data.micro_bsz * MICRO_BATCHES / seconds_per_step
    tflops = tokens * decoder.flops_per_token(config.data.seq_len) / 1e12
    return {
        "tokens/s": tokens,
        "TFLOPS": tflops,
        "ms": 1e3 * seconds_per_step,
        "GB": torch.cuda.max_memory_allocated() / 1e9,
    }


def measure(name: str, shape: str, steps: int, out: Path) -> dict[str, float]:
    """One measurement, in a process of its own; empty when it failed."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--worker", name, "--shapes", shape, "--steps", str(steps), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{name} failed:\n{done.stderr[-2000:]}", flush=True)
        return {}
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {json.dumps({key: round(value, 2) for key, value in found.items() if ' ms ' not in key})}", flush=True)
    return found


def table(found: dict[str, dict[str, float]], shape: str) -> None:
    """Prints the results of all measurements, and where the time of a step goes."""
    print(f"\n{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, shape {shape}")
    for name, values in found.items():
        for key, value in values.items():
            if "tokens/s" not in values:
                print(f"{name:14}{key:64}{value:12.1f}")
    print(f"\n{'':14}{'tokens/s':>10}{'TFLOPS':>10}{'ms':>10}{'GB':>10}")
    for name, values in found.items():
        if "tokens/s" in values:
            print(f"{name:14}{values['tokens/s']:10.0f}" + "".join(f"{values[key]:10.1f}" for key in ("TFLOPS", "ms", "GB")))
    profiled = {name: values for name, values in found.items() if f"ms of {GAPS}" in values}
    if profiled:
        print(f"\n{'ms of a step':30}{'least':>10}" + "".join(f"{name:>12}" for name in profiled))
        for part in (*PARTS, OTHERS, GAPS):
            least = next((v[f"least ms of {part}"] for v in profiled.values() if f"least ms of {part}" in v), None)
            times = "".join(f"{values.get(f'ms of {part}', 0.0):12.1f}" for values in profiled.values())
            print(f"{part:30}{'' if least is None else f'{least:.1f}':>10}{times}")


def main() -> None:
    parser = options(__doc__, ["1B"], steps=14, rounds=1)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    names = ["card", "kernels", *STEPS, "plain loop", "transformers", "liger"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="which measurements (all)")
    parser.add_argument("--worker", choices=names, help=argparse.SUPPRESS)
    a = parser.parse_args()
    shape = SHAPES[a.shapes[0]]
    work: dict[str, Callable[[], dict[str, float]]] = {
        "card": card, "kernels": kernels,
        **{name: partial(step, shape, name, a.steps, a.out) for name in STEPS},
        "plain loop": lambda: plain_loop(shape, a.steps),
        "transformers": lambda: transformers(shape, a.steps, False), "liger": lambda: transformers(shape, a.steps, True),
    }  # fmt: skip
    if a.worker:
        print(json.dumps(work[a.worker]()))
        return
    for name in a.shapes:
        out = a.out / name
        found = {which: measure(which, name, a.steps, out) for which in a.only}
        (out / "gpu.json").write_text(json.dumps(found, indent=1))
        table(found, name)


if __name__ == "__main__":
    main()
