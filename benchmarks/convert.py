"""Speed and memory of conversion against a plain copy: ``python benchmarks/convert.py --gb 8``.

A Hugging Face folder with random bf16 weights in shards of 5 GB is copied (``cp -r``) and converted, in turns; each conversion
is a process of its own. Printed are medians of the time until everything is on disk, their ratio to the copy, and the largest
resident memory of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def make(folder: Path, family: str, gigabytes: float, width: int = 4096) -> None:
    """Writes a folder of about the given size, tensor by tensor; ``width``: the hidden size, a multiple of 512."""
    import torch

    from internevo.models.families.registry import decoder_from_hf
    from internevo.models.huggingface.folder import naming
    from internevo.storage.header import Spec
    from internevo.storage.tensors import ShardWriter

    common: dict[str, Any] = {
        "hidden_size": width, "num_attention_heads": width // 128, "num_key_value_heads": width // 512, "vocab_size": 32000,
        "rms_norm_eps": 1e-5, "intermediate_size": width * 7 // 2, "max_position_embeddings": 4096, "hidden_act": "silu",
        "tie_word_embeddings": False,
    }  # fmt: skip
    families: dict[str, dict[str, Any]] = {
        "LLAMA2": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        "INTERNLM2": {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False},
        "MIXTRALMOE": {
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8,
            "intermediate_size": width * 7 // 8,
        },
    }  # fmt: skip
    layers = 0
    while True:
        values = {**common, **families[family], "num_hidden_layers": layers + 1}
        if decoder_from_hf(values, "").parameters() * 2 > gigabytes * 1e9:
            break
        layers += 1
    values["num_hidden_layers"] = layers
    folder.mkdir(parents=True)
    specs = {name: Spec(shape, torch.bfloat16) for name, shape in naming(decoder_from_hf(values, "")).shapes.items()}
    writer = ShardWriter(folder, specs, 5 * 10**9, lambda n, count: f"model-{n:05d}-of-{count:05d}.safetensors")
    for spec in specs.values():
        for _, count in spec.chunks(0, spec.rows):
            writer.add(torch.randn(count, *spec.row_shape).to(torch.bfloat16))
    writer.close()
    index = {"metadata": {"total_size": sum(s.nbytes for s in specs.values())}, "weight_map": writer.files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(values))


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds until what a command writes is on disk, and its peak memory in GB."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    os.sync()
    return time.perf_counter() - begin, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=8.0)
    parser.add_argument("--width", type=int, default=4096, help="hidden size, a multiple of 512")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--families", nargs="+", default=["LLAMA2"], choices=["LLAMA2", "INTERNLM2", "MIXTRALMOE"])
    parser.add_argument("--folder", type=Path, help="where the files go; by default the temporary folder")
    a = parser.parse_args()
    internevo = [sys.executable, "-m", "internevo", "convert"]
    for family in a.families:
        with tempfile.TemporaryDirectory(dir=a.folder) as place:
            source, ours, target = (Path(place) / name for name in ("source", "ours", "target"))
            make(source, family, a.gb, a.width)
            print(f"{family}, {a.gb:g} GB", flush=True)
            compare(source, target, a.rounds, {
                "hf -> internevo": [*internevo, str(source), str(target), "--to", "internevo"],
                "hf -> hf": [*internevo, str(source), str(target), "--to", "hf"],
                "hf -> hf, fp16": [*internevo, str(source), str(target), "--to", "hf", "--dtype", "float16"],
            })  # fmt: skip
            subprocess.run([*internevo, str(source), str(ours), "--to", "internevo"], check=True, stdout=subprocess.DEVNULL)
            shutil.rmtree(source)
            compare(ours, target, a.rounds, {"internevo -> hf": [*internevo, str(ours), str(target), "--to", "hf"]})


def compare(source: Path, target: Path, rounds: int, commands: dict[str, list[str]]) -> None:
    """Runs a copy and the commands in turns; source and one target are all that must fit into the page cache."""
    commands = {"cp -r": ["cp", "-r", str(source), str(target)], **commands}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            found[name].append(timed(command))
    shutil.rmtree(target)
    for name, rows in found.items():
        ratio = statistics.median(r[0] / b[0] for r, b in zip(rows, found["cp -r"], strict=True))
        seconds, memory = (statistics.median(r[k] for r in rows) for k in (0, 1))
        print(f"  {name:18}{seconds:8.1f} s{ratio:8.2f}{memory:8.2f} GB", flush=True)


if __name__ == "__main__":
    main()
