"""Tokenizes raw files into a tokenized dataset: workers take pieces of the input, one writer keeps their order.

The output depends on the input and the options, not on the number of workers.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..tokenizer import Tokenizer, load_tokenizer, train_bpe
from .documents import texts
from .inputs import Job, find_files, make_jobs
from .tokenized import TokenWriter

PART_TOKENS = 2**30
"""Tokens in one output file."""


@dataclass
class Result:
    """What a run made."""

    documents: int = 0
    tokens: int = 0
    valid_documents: int = 0
    valid_tokens: int = 0
    vocab_size: int = 0


@dataclass
class _Done:
    """One job's documents: ids one after another, and each document's length."""

    ids: npt.NDArray[np.int32]
    counts: list[int]
    size: int


def tokenize(
    inputs: list[Path],
    output: Path,
    *,
    tokenizer: Path | None = None,
    train_vocab_size: int | None = None,
    kind: str | None = None,
    text_key: str | None = None,
    pattern: str | None = None,
    exclude: tuple[str, ...] = (),
    dataset_type: str = "en",
    valid_ratio: float = 0.0,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    status: Callable[[str], None] = lambda text: None,
) -> Result:
    """Writes ``output/dataset_type`` (or ``output/train/...`` and ``output/valid/...`` with ``valid_ratio``).

    Args:
        tokenizer: a tokenizer file or folder; or else ``train_vocab_size``, which trains one into ``output``.
        progress: called with bytes done and bytes in all.

    Raises:
        DataError: when a document cannot be read (named with its place); nothing half-written stays behind.
    """
    files = find_files(inputs, kind, pattern, exclude)
    _prepare(output, overwrite)
    if tokenizer is None:
        assert train_vocab_size is not None
        status(f"training a byte-level BPE tokenizer of {train_vocab_size:,} entries")
        found = (text for job in make_jobs(files) for text in texts(job, text_key))
        tokenizer = train_bpe(found, train_vocab_size, output)
    result = Result(vocab_size=load_tokenizer(tokenizer).vocab_size)
    writers = _Writers(output, dataset_type, valid_ratio, result)
    try:
        total, done = sum(path.stat().st_size for _, path in files), 0
        for part in _run(make_jobs(files), tokenizer, text_key, workers or os.cpu_count() or 1):
            writers.write(part)
            done += part.size
            progress(done, total)
        writers.close()
    except BaseException:
        writers.discard()
        raise
    return result


def _prepare(output: Path, overwrite: bool) -> None:
    """Refuses to mix new data with old."""
    old = list(output.glob("**/*.bin")) if output.is_dir() else []
    if old and not overwrite:
        raise UsageError(f"{output} holds tokenized data already ({old[0].name}, ...); give --overwrite or another --output")
    for path in old:
        path.unlink()
        path.with_name(path.name + ".meta").unlink(missing_ok=True)
    if output.is_dir():
        shutil.rmtree(output / ".internevo", ignore_errors=True)


class _Writers:
    """The train and valid parts, each a row of files."""

    def __init__(self, output: Path, dataset_type: str, valid_ratio: float, result: Result) -> None:
        self.folders = {False: output / dataset_type, True: output / "valid" / dataset_type}
        if valid_ratio:
            self.folders[False] = output / "train" / dataset_type
        self.threshold = int(valid_ratio * 2**64)
        self.result, self.number = result, 0
        self.open: dict[bool, TokenWriter] = {}
        self.parts = {False: 0, True: 0}

    def write(self, part: _Done) -> None:
        starts = np.cumsum([0, *part.counts])
        valid = np.array([self._is_valid(self.number + n) for n in range(len(part.counts))], dtype=bool)
        self.number += len(part.counts)
        counts = np.array(part.counts, dtype=np.int64)
        for which in (False, True):
            chosen = np.flatnonzero(valid == which)
            if not len(chosen):
                continue
            whole = len(chosen) == len(counts)
            ids = part.ids if whole else np.concatenate([part.ids[starts[n] : starts[n + 1]] for n in chosen])
            self._writer(which).write(ids, counts[chosen])
            if which:
                self.result.valid_documents += len(chosen)
                self.result.valid_tokens += len(ids)
            else:
                self.result.documents += len(chosen)
                self.result.tokens += len(ids)

    def _is_valid(self, number: int) -> bool:
        """A function of the document's number: about ``valid_ratio`` of all, spread evenly."""
        if not self.threshold:
            return False
        return int.from_bytes(hashlib.blake2b(str(number).encode(), digest_size=8).digest(), "little") < self.threshold

    def _writer(self, valid: bool) -> TokenWriter:
        writer = self.open.get(valid)
        if writer is not None and writer.tokens >= PART_TOKENS:
            writer.close()
            writer = None
        if writer is None:
            path = self.folders[valid] / f"part-{self.parts[valid]:05d}.bin"
            writer = self.open[valid] = TokenWriter(path, self.result.vocab_size)
            self.parts[valid] += 1
        return writer

    def close(self) -> None:
        for writer in self.open.values():
            writer.close()

    def discard(self) -> None:
        for writer in self.open.values():
            writer.discard()


# Workers -------------------------------------------------------------------------------------------------------------


def _run(jobs: Iterator[Job], tokenizer: Path, key: str | None, workers: int) -> Iterator[_Done]:
    """Tokenizes jobs in order, in ``workers`` processes. Jobs are made as workers take them: they may hold content."""
    work = partial(_work, tokenizer, key)
    first = list(islice(jobs, workers))
    if len(first) <= 1:
        yield from map(work, chain(first, jobs))
        return
    with multiprocessing.get_context("forkserver").Pool(len(first), initializer=_one_core) as pool:
        yield from pool.imap(work, chain(first, jobs))


def _one_core() -> None:
    """A worker process has one core; the tokenizers library would take all."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _work(path: Path, key: str | None, job: Job) -> _Done:
    tokenizer = _tokenizer(path)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids: list[list[int]] = []
    counts = []
    for encoded in tokenizer.backend.encode_batch(list(texts(job, key))):
        if encoded:  # an empty document teaches nothing
            ids += [bos, encoded, eos]
            counts.append(len(bos) + len(encoded) + len(eos))
    flat = np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=sum(counts))
    return _Done(flat, counts, job.size)


@cache
def _tokenizer(path: Path) -> Tokenizer:
    """Loaded once in each worker process."""
    return load_tokenizer(path)
