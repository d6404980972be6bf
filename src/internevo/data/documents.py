"""Raw documents: which files there are, how they are cut into jobs, and the text in them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, UsageError

SUFFIXES = {"text": (".txt",), "json": (".json",), "jsonl": (".jsonl",)}
TEXT_KEYS = ("content", "text")
JOB_BYTES = 1 << 20
"""Input that a worker takes at once."""


@dataclass(frozen=True)
class Job:
    """A piece of the input: some whole files, or a byte range of one file of lines."""

    kind: str
    files: tuple[tuple[str, int], ...]
    """(path, size in bytes)"""
    start: int = 0
    stop: int = 0

    @property
    def size(self) -> int:
        """Bytes of input."""
        return self.stop - self.start if self.kind == "jsonl" else sum(size for _, size in self.files)


def find_files(inputs: list[Path], kind: str | None, pattern: str | None, exclude: tuple[str, ...]) -> list[tuple[str, Path]]:
    """(kind, path) of every input file, folders searched in sorted order.

    Args:
        kind: text, json or jsonl; by default from each file's suffix.
        pattern: a glob for file names inside folders, instead of the kind's usual suffixes.
        exclude: names of folders that are not entered.
    """
    found: list[tuple[str, Path]] = []
    for path in inputs:
        if path.is_file():
            found.append((kind or _kind(path), path))
        elif path.is_dir():
            found += [(kind or _kind(file), file) for file in _walk(path, kind, pattern, exclude)]
        else:
            raise UsageError(f"input {path} does not exist")
    if not found:
        raise UsageError(f"no input files in {', '.join(map(str, inputs))}: give --format or --pattern, or check the folder")
    return found


def _walk(root: Path, kind: str | None, pattern: str | None, exclude: tuple[str, ...]) -> Iterator[Path]:
    suffixes = SUFFIXES[kind] if kind else tuple(s for group in SUFFIXES.values() for s in group)
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if n not in exclude and not n.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if (path.match(pattern) if pattern else path.suffix in suffixes) and path.is_file():
                yield path


def _kind(path: Path) -> str:
    for kind, suffixes in SUFFIXES.items():
        if path.suffix in suffixes:
            return kind
    raise UsageError(f"{path}: the format cannot be told from {path.suffix!r}; give --format text, json or jsonl")


def make_jobs(files: list[tuple[str, Path]]) -> list[Job]:
    """Cuts the input into pieces of about ``JOB_BYTES``, in order."""
    jobs: list[Job] = []
    pending: list[tuple[str, int]] = []

    def flush() -> None:
        if pending:
            jobs.append(Job("text", tuple(pending)))
            pending.clear()

    for kind, path in files:
        size = path.stat().st_size
        if kind == "text":
            if sum(s for _, s in pending) + size > JOB_BYTES:
                flush()
            pending.append((str(path), size))
            continue
        flush()
        step = JOB_BYTES if kind == "jsonl" else max(size, 1)
        jobs += [Job(kind, ((str(path), size),), a, min(a + step, size)) for a in range(0, size, step)]
    flush()
    return jobs


def texts(job: Job, key: str | None) -> Iterator[str]:
    """The text of each document of a job.

    Raises:
        DataError: naming file, line or byte, when a text is not UTF-8, a line not JSON, or the key not there.
    """
    readers = {"text": _text_files, "json": _json_file, "jsonl": _json_lines}
    yield from readers[job.kind](job, key)


def _text_files(job: Job, key: str | None) -> Iterator[str]:
    for path, _ in job.files:
        yield decode(Path(path).read_bytes(), path)


def _json_file(job: Job, key: str | None) -> Iterator[str]:
    """One object, or a list of them."""
    path = job.files[0][0]
    try:
        content = json.loads(decode(Path(path).read_bytes(), path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    for number, item in enumerate(content if isinstance(content, list) else [content]):
        yield text_of(item, key, f"{path}, item {number}")


def _json_lines(job: Job, key: str | None) -> Iterator[str]:
    """The lines that begin in the job's byte range."""
    path = job.files[0][0]
    with open(path, "rb") as file:
        if job.start:
            file.seek(job.start - 1)
            file.readline()  # the line that began before belongs to the job before
        while file.tell() < job.stop:
            offset = file.tell()
            line = file.readline()
            if not line.strip():
                continue
            where = f"{path}, byte {offset}"
            try:
                item = json.loads(decode(line, path, offset))
            except ValueError as error:
                raise DataError(f"{where}: the line is not JSON: {error}") from error
            yield text_of(item, key, where)


def decode(content: bytes, path: str, offset: int = 0) -> str:
    """UTF-8, or an error with the byte's position in the file."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {offset + error.start} (0x{content[error.start]:02x})") from None


def text_of(item: Any, key: str | None, where: str) -> str:
    """The text of one JSON object."""
    if isinstance(item, str) and key is None:
        return item
    keys = (key,) if key else TEXT_KEYS
    for name in keys:
        if isinstance(item, dict) and isinstance(item.get(name), str):
            return str(item[name])
    has = ", ".join(map(repr, item)) if isinstance(item, dict) else type(item).__name__
    raise DataError(f"{where} has no text under {' or '.join(map(repr, keys))} (it has {has}); give --text-key")
