"""What a checkpoint costs the step that starts it, against a plain copy to host memory. ``python benchmarks/checkpoint.py``."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from ours import SHAPES, build

from internevo.checkpoint.finish import Extras
from internevo.checkpoint.saver import Saver
from internevo.parallel import gloo
from internevo.parallel.world import World, join


def measure(world: World, shape: dict[str, int], rounds: int, folder: Path) -> tuple[float, float, float, float]:
    """GB of the weights and moments; median seconds of a copy, of the wait, and until everything is written."""
    parts = build(world, shape, "float32")
    tensors = parts.tensors()
    saver = Saver(folder, parts.config.ckpt, world.rank, {}, gloo.new_group())
    copies, waits, wholes = [], [], []
    for number in range(rounds + 1):  # the first one is not counted
        begin = time.perf_counter()
        copy = [tensor.clone() for tensor in tensors.values()]
        copies.append(time.perf_counter() - begin)
        del copy
        begin = time.perf_counter()
        saver.save(number, tensors, Extras({"model.json": parts.decoder.to_dict(), "state.json": {"step": number}}))
        waits.append(time.perf_counter() - begin)
        saver.wait()
        wholes.append(time.perf_counter() - begin)
    copy_time, wait, whole = (statistics.median(times[1:]) for times in (copies, waits, wholes))
    return sum(t.nbytes for t in tensors.values()) / 1e9, copy_time, wait, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["M"], choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    with join() as world:
        for shape in a.shapes:
            with tempfile.TemporaryDirectory() as folder:
                report(shape, *measure(world, SHAPES[shape], a.rounds, Path(folder)))


def report(shape: str, size: float, copy: float, wait: float, whole: float) -> None:
    print(f"{shape}, {size:.2f} GB: copy {copy:.2f} s, the step waits {wait:.2f} s, written after {whole:.2f} s")


if __name__ == "__main__":
    main()
