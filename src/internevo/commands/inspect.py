"""``internevo inspect``: describes what a folder contains, and checks that it is intact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..checkpoint import Checkpoint, complete_checkpoints
from ..checkpoint.manifest import NAME, verify
from ..data.encoding.describe import describe_raw
from ..data.raw.hub import METADATA_FILES
from ..data.raw.inputs import find_files
from ..data.tokenized.describe import describe_dataset
from ..data.tokenized.index import WORK
from ..errors import UsageError
from ..models.families.registry import family
from ..models.huggingface.folder import HfFolder
from ..models.source import ParameterSource, dtypes
from ..observe.metrics import usable_rows
from ..storage.hub import model_folder


def describe(path: Path, tokenizer: Path | None = None, decode: int = 0) -> Iterator[str]:
    """Yields lines of text that describe a checkpoint, a run folder, a Hugging Face model, tokenized data or raw data.

    Args:
        tokenizer: for tokenized data: every id must be in its vocabulary.
        decode: for tokenized data: the number of documents to show as text.

    Raises:
        UsageError: if it is none of these.
        CheckpointError: if a checkpoint is damaged; the message says which file and where.
        DataError: if tokenized data is damaged; the message says which file and where.
    """
    path = model_folder(path)
    if path.is_file():
        return describe_raw(path, find_files([path], None, None, ()))
    if not path.is_dir():
        raise UsageError(f"{path} does not exist")
    if (path / NAME).is_file() or (path / "state.json").is_file():
        return _describe_checkpoint(path)
    if (path / "metrics.jsonl").is_file() or (path / "checkpoints").is_dir():
        return _describe_run(path)
    if (path / "config.json").is_file():
        return _describe_hf(path)
    if any(path.rglob("*.bin")) or (path / WORK).is_dir():
        return describe_dataset(path, tokenizer, decode)
    try:
        return describe_raw(path, [file for file in find_files([path], None, None, ()) if file[1].name not in METADATA_FILES])
    except UsageError:  # there is no file of raw data
        raise UsageError(f"{path} contains neither a checkpoint, a run, a Hugging Face model nor data") from None


def _describe_checkpoint(path: Path) -> Iterator[str]:
    checkpoint = Checkpoint(path)
    manifest = checkpoint.manifest
    yield f"checkpoint {path}: step {manifest.step}"
    yield f"model: {checkpoint.config.summary()}, {_dtypes(checkpoint)}"
    kinds = sorted({name.split("/")[0] for name in manifest.tensors})
    size = sum(f.size for f in manifest.files.values())
    yield f"contains: {', '.join(kinds)}; {len(manifest.tensors)} tensors in {len(manifest.files)} files, {size / 1e6:,.1f} MB"
    axes = ", ".join(f"{axis} {n}" for axis, n in manifest.layout.items())
    yield f"written by: internevo {manifest.versions['internevo']}, torch {manifest.versions['torch']}; layout: {axes}"
    verify(path, sorted(manifest.files), manifest)
    yield "intact: every file has the size and the checksum in the manifest"


def _dtypes(source: ParameterSource) -> str:
    """Returns the dtypes of the weights, the most frequent one first."""
    usual, *others = dtypes(source)
    return f"{usual}" + "".join(f", some {dtype}" for dtype in others)


def _describe_run(path: Path) -> Iterator[str]:
    file = path / "metrics.jsonl"
    rows, damaged = usable_rows(file, {"loss": int | float | None, "consumed_tokens": int})
    yield f"run {path}: {len(rows)} steps"
    if damaged:
        yield f"damaged: {damaged} lines of {file}, which are left out here"
    if rows:
        step, loss, tokens = (rows[-1][key] for key in ("step", "loss", "consumed_tokens"))
        yield f"last step: {step}, {'no loss' if loss is None else f'loss {loss:.4f}'}, {tokens:,} tokens"
    found = complete_checkpoints(path)
    if not found:
        yield "no complete checkpoint"
    for folder in found:
        yield from _describe_checkpoint(folder)


def _describe_hf(path: Path) -> Iterator[str]:
    folder = HfFolder(path)
    config = folder.config
    yield f"Hugging Face model {path}: {family(config.family).ARCHITECTURE}"
    yield f"model: {config.summary()}, {_dtypes(folder)}; tokenizer: {'yes' if folder.tokenizer else 'no'}"
    read = 0
    for disk in folder.naming.shapes:
        spec = folder.weights.spec(disk)
        read += sum(folder.weights.read(disk, row, count).numel() for row, count in spec.chunks(0, spec.rows))
    yield f"intact: all {len(folder.naming.shapes)} tensors can be read, {read:,} values"
