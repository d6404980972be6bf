"""What a checkpoint costs the step that starts it, against a plain copy to host memory. ``python benchmarks/checkpoint.py``."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from vs_transformers import SHAPES

from internevo.checkpoint.saver import Extras, Saver
from internevo.config import validate
from internevo.models.families.registry import decoder_config
from internevo.parallel import plan
from internevo.parallel.layout import Layout
from internevo.parallel.world import join
from internevo.train.optimizer import Optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    shape = SHAPES["M"]
    config = validate({
        "model_type": "LLAMA2",
        "model": {
            "num_layers": shape["layers"], "hidden_size": shape["hidden"], "intermediate_size": shape["mlp"],
            "num_attention_heads": shape["heads"], "num_kv_attention_heads": shape["kv"], "vocab_size": shape["vocab"],
            "dtype": "fp32",
        },
        "data": {"seq_len": 8, "micro_bsz": 1, "total_steps": 1}, "adam": {"lr": 1e-4},
    })  # fmt: skip
    with join() as world, tempfile.TemporaryDirectory() as folder:
        layout = Layout.of(config.parallel, world.size)
        model = decoder_config("LLAMA2", config.model)
        _, axis = plan.build(model, config.model, layout, world.device, seed=0)
        tensors = named_tensors(Optimizer(axis.masters, config.adam))
        saver = Saver(Path(folder), config.ckpt, world.rank, {})
        copies, starts, wholes = [], [], []
        for number in range(a.rounds + 1):
            begin = time.perf_counter()
            copy = [tensor.clone() for tensor in tensors.values()]
            copies.append(time.perf_counter() - begin)
            del copy
            begin = time.perf_counter()
            saver.save(number, tensors, Extras({"model.json": model.to_dict(), "state.json": {"step": number}}))
            starts.append(time.perf_counter() - begin)
            saver.wait()
            wholes.append(time.perf_counter() - begin)
        size = sum(t.nbytes for t in tensors.values()) / 1e9
        copy_time, start, whole = (statistics.median(times[1:]) for times in (copies, starts, wholes))
        print(f"{size:.2f} GB: copy {copy_time:.2f} s, the step waits {start:.2f} s, written after {whole:.2f} s")


if __name__ == "__main__":
    main()
