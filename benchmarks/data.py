"""Speed of data: packing from the binary form, opening an index, tokenizing. ``python benchmarks/data.py``."""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np

from internevo.data.index import open_index
from internevo.data.inputs import find_files
from internevo.data.order import Order
from internevo.data.rows import PackedRows
from internevo.data.tokenize import tokenize
from internevo.data.tokenized import TokenWriter
from internevo.demo import NOT_SOURCE


def packing(folder: Path, files: int, documents: int) -> None:
    """Writes short documents (the worst case), opens them twice, and reads rows in random order."""
    draw = np.random.default_rng(0)
    for number in range(files):
        counts = draw.integers(1, 30, size=documents)
        writer = TokenWriter(folder / "en" / f"{number}.bin", vocab_size=32000)
        writer.write(draw.integers(0, 32000, size=counts.sum()), counts)
        writer.close()
    for name in ("first", "second"):
        begin = time.perf_counter()
        index = open_index(folder)
        print(f"opening {files:,} files, {len(index):,} documents, the {name} time: {time.perf_counter() - begin:.2f} s")
    rows = PackedRows(index, 2048, 32000)
    numbers = Order(len(rows), 0)(np.arange(3000))
    begin = time.perf_counter()
    for number in numbers:
        rows[int(number)]
    rate = len(numbers) * 2048 / (time.perf_counter() - begin)
    print(f"packing documents of 15 tokens: {rate / 1e6:.1f} million tokens per second")


def tokenizing(folder: Path, copies: int, rounds: int) -> None:
    """The command's work on the standard library's source, against the tokenizers library on the same texts and cores."""
    from tokenizers import Tokenizer

    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text() for _, path in find_files([library], "text", "*.py", NOT_SOURCE)]
    for copy in range(copies):
        for number, text in enumerate(texts):
            path = folder / "in" / str(copy) / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    tokenize([folder / "in" / "0"], folder / "first", train_vocab_size=4096)
    fast = Tokenizer.from_file(str(folder / "first" / "tokenizer.json"))
    ratios = []
    for number in range(rounds):
        begin = time.perf_counter()
        tokenize([folder / "in"], folder / f"out{number}", tokenizer=folder / "first")
        ours = time.perf_counter() - begin
        begin = time.perf_counter()
        everything = [p.read_text() for _, p in find_files([folder / "in"], "text", None, ())]
        for start in range(0, len(everything), 500):
            [e.ids for e in fast.encode_batch_fast(everything[start : start + 500], add_special_tokens=False)]
        ratios.append(ours / (time.perf_counter() - begin))
    size = sum(len(t.encode()) for t in texts) * copies / 1e6
    print(f"tokenizing {size:.0f} MB: {statistics.median(ratios):.2f} of the time of the tokenizers library itself (median)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--documents", type=int, default=10_000, help="in each file")
    parser.add_argument("--copies", type=int, default=6, help="of the standard library")
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        packing(Path(folder) / "packing", a.files, a.documents)
        tokenizing(Path(folder) / "tokenizing", a.copies, a.rounds)


if __name__ == "__main__":
    main()
