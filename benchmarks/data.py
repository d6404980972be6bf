"""Speed of data: packing from the binary form, opening an index, streaming, tokenizing. ``python benchmarks/data.py``."""

from __future__ import annotations

import argparse
import os
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

from internevo.commands.demo import EXCLUDED
from internevo.config.data import Data
from internevo.data.batches import BatchSizes, Cursor, TrainBatches
from internevo.data.build import train_source
from internevo.data.encoding.tokenize import tokenize
from internevo.data.order import Order
from internevo.data.raw.inputs import find_files
from internevo.data.rows import PackedRows
from internevo.data.tokenized.files import TokenWriter
from internevo.data.tokenized.index import open_index
from internevo.text.tokenizer import train_bpe


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


def library_texts() -> list[str]:
    """The source files of Python's standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text() for _, path in find_files([library], "text", "*.py", EXCLUDED)]


def tokenizing(folder: Path, copies: int, rounds: int) -> None:
    """The command's work on the standard library's source, against the tokenizers library on the same texts and cores."""
    from tokenizers import Tokenizer

    texts = library_texts()
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


def streaming(folder: Path, copies: int, rounds: int, first: int = 4_000_000) -> None:
    """As many rows as an epoch has, streamed from parquet, against the tokenizers library on the same file and cores.

    Blocks come at once and are small at first, so the ``first`` tokens are not measured.
    """
    from tokenizers import Tokenizer

    texts = library_texts()
    tokenizer = train_bpe(texts, 4096, folder / "tokenizer")
    file = folder / "data" / "train.parquet"
    file.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.table({"text": texts * copies}), file, row_group_size=20)
    fast = Tokenizer.from_file(str(tokenizer))
    data = Data(
        type="streaming", train_folder=str(file.parent), tokenizer_path=str(tokenizer), seq_len=2048, micro_bsz=1,
        global_batch_size=16, total_steps=10**6, num_worker=os.cpu_count() or 1,
    )  # fmt: skip
    ratios = []
    for _ in range(rounds):
        begin = time.perf_counter()
        tokens = 0
        for group in parquet.ParquetFile(file).iter_batches(500):
            tokens += sum(len(e.ids) + 1 for e in fast.encode_batch_fast(group["text"].to_pylist(), add_special_tokens=False))
        theirs = tokens / (time.perf_counter() - begin)
        sizes = BatchSizes.from_config(data, 1)
        batches = TrainBatches(train_source(data, 4096), sizes, 0, True, data.total_steps).prefetch(Cursor())
        before = seen = 0
        while before < first:
            before += next(batches).tokens
        begin = time.perf_counter()
        while seen < tokens:
            seen += next(batches).tokens
        ratios.append(seen / (time.perf_counter() - begin) / theirs)
        batches.close()  # type: ignore[attr-defined]
    print(f"streaming {tokens / 1e6:.0f} million tokens: {statistics.median(ratios):.2f} of the library's speed (median)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ("packing", "streaming", "tokenizing")
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--documents", type=int, default=10_000, help="in each file")
    parser.add_argument("--copies", type=int, default=6, help="of the standard library")
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if "packing" in a.parts:
            packing(Path(folder) / "packing", a.files, a.documents)
        if "streaming" in a.parts:
            streaming(Path(folder) / "streaming", a.copies, a.rounds)
        if "tokenizing" in a.parts:
            tokenizing(Path(folder) / "tokenizing", a.copies, a.rounds)


if __name__ == "__main__":
    main()
