"""The program's own step on random tokens, for the benchmarks."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from typing import Any

import torch

from internevo.config import Config, validate
from internevo.data.batches import Cursor, MicroBatch, StepBatch
from internevo.parallel.world import World
from internevo.train.parts import Parts
from internevo.train.process import prepare
from internevo.train.shared import Shared
from internevo.train.step import Stepper

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"layers": 4, "hidden": 32, "mlp": 48, "heads": 4, "kv": 2, "vocab": 96, "rows": 2, "seq": 16},
    "S": {"layers": 6, "hidden": 384, "mlp": 1024, "heads": 6, "kv": 6, "vocab": 8192, "rows": 4, "seq": 512},
    "S12": {"layers": 12, "hidden": 256, "mlp": 704, "heads": 4, "kv": 4, "vocab": 2048, "rows": 1, "seq": 512},
    "M": {"layers": 8, "hidden": 768, "mlp": 2048, "heads": 12, "kv": 4, "vocab": 32000, "rows": 2, "seq": 1024},
    "1B": {"layers": 22, "hidden": 2048, "mlp": 5632, "heads": 32, "kv": 4, "vocab": 32000, "rows": 2, "seq": 4096},
}


def options(description: str, shapes: list[str], steps: int, rounds: int) -> argparse.ArgumentParser:
    """The options that the benchmarks of training share, with these defaults."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=shapes, choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=steps, help="steps of each program in each round")
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds, each with new processes")
    return parser


def config_of(shape: dict[str, int], dtype: str, compiled: bool = False, parallel: Any = None) -> Config:
    """A config of one micro-batch per step."""
    model = {
        "num_layers": shape["layers"], "hidden_size": shape["hidden"], "intermediate_size": shape["mlp"],
        "num_attention_heads": shape["heads"], "num_kv_attention_heads": shape["kv"], "vocab_size": shape["vocab"],
        "dtype": dtype, "compile": compiled,
    }  # fmt: skip
    data = {"seq_len": shape["seq"], "micro_bsz": shape["rows"], "total_steps": 1_000_000}
    return validate({"model_type": "LLAMA2", "model": model, "parallel": parallel or {}, "adam": {"lr": 1e-4},
                     "hybrid_zero_optimizer": {"clip_grad_norm": 1.0}, "data": data})  # fmt: skip


def tokens_and_labels(shape: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, seq] random ids, and the next ones."""
    tokens = torch.randint(0, shape["vocab"], (shape["rows"], shape["seq"]))
    return tokens, torch.cat([tokens[:, 1:], torch.full((shape["rows"], 1), -100)], dim=1)


def finish(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build(
    world: World, shape: dict[str, int], dtype: str, compiled: bool = False, parallel: dict[str, Any] | None = None
) -> Parts:
    """A run as ``internevo train`` builds it."""
    config = config_of(shape, dtype, compiled, parallel)
    prepare(config, world.device)
    return Parts.build(config, world)


def steps_of(
    world: World, shape: dict[str, int], dtype: str, compiled: bool = False, parallel: dict[str, Any] | None = None,
    micro_batches: int = 1,
) -> Iterator[float]:  # fmt: skip
    """Takes steps as ``internevo train`` does, and yields the seconds of each."""
    stepper = Stepper(build(world, shape, dtype, compiled, parallel))
    for number in itertools.count():
        micros = []
        for _ in range(micro_batches):
            tokens, labels = tokens_and_labels(shape)
            micros.append(MicroBatch(tokens, labels, torch.zeros_like(tokens), None))
        batch = StepBatch(micros, number, Cursor(), micro_batches * tokens.numel())
        begin = time.perf_counter()
        stepper(batch, 1e-4, 0.95, lambda: Shared(0.0, 0.0, 0.0, 0.0, [0.0] * world.size))
        finish(world.device)
        yield time.perf_counter() - begin
