"""``internevo inspect``: describes what a folder contains, and checks that it is intact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint import Checkpoint, complete_checkpoints
from ..checkpoint.manifest import NAME, verify
from ..data.encoding.describe import describe_raw
from ..data.raw.hub import METADATA_FILES
from ..data.raw.inputs import find_files
from ..data.tokenized.describe import describe_dataset
from ..data.tokenized.files import meta_path
from ..data.tokenized.index import WORK
from ..errors import UsageError
from ..models.families.hf_values import is_of_tokenizer
from ..models.families.registry import family
from ..models.huggingface import gguf, peft
from ..models.huggingface.folder import HfFolder
from ..models.huggingface.tokenizer import TOKENIZER_FILES, has_tokenizer
from ..models.source import ParameterSource, dtypes
from ..observe.metrics import usable_rows
from ..observe.rundata import RunData
from ..storage.hub import model_folder
from ..storage.jsonfile import read_object
from ..storage.tensors import TensorFile
from ..text.chat import templates
from ..text.tokenizer import load_tokenizer
from ..wording import counted


def describe(path: Path, tokenizer: Path | None = None, decode: int = 0) -> Iterator[str]:
    """Yields lines of text that describe a checkpoint, a run folder, a folder of run folders, a Hugging Face model, adapters of
    the peft library, a GGUF file, a tokenizer, tokenized data or raw data.

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
        return _describe_file(path, tokenizer, decode)
    if not path.is_dir() and path.with_name(path.name + ".bin").is_file():  # as data.train_folder names a Megatron dataset
        return describe_dataset(path, tokenizer, decode)
    if not path.is_dir():
        raise UsageError(f"{path} does not exist")
    if (path / NAME).is_file() or (path / "state.json").is_file():
        return _describe_checkpoint(path)
    if _is_run(path):
        return _describe_run(path)
    if (path / "config.json").is_file() and not is_of_tokenizer(read_object(path / "config.json")):
        return _describe_hf(path)
    if (path / peft.CONFIG).is_file():
        return _describe_adapters(path)
    if (path / gguf.NAME).is_file():
        return _describe_gguf(path / gguf.NAME)
    if runs := _runs_below(path):
        return _describe_runs(path, runs)
    if any(path.rglob("*.bin")) or (path / WORK).is_dir():
        return describe_dataset(path, tokenizer, decode)
    try:
        raw = [file for file in find_files([path], None, None, ()) if file[1].name not in METADATA_FILES]
    except UsageError:  # there is no file of raw data
        raw = []
    if has_tokenizer(path) and all(file.name in (*TOKENIZER_FILES, "config.json") for _, file in raw):
        return _describe_tokenizer(path)
    if not raw:
        raise UsageError(f"{path} contains neither a checkpoint, a run, a Hugging Face model, a tokenizer nor data")
    return describe_raw(path, raw)


def _describe_file(path: Path, tokenizer: Path | None, decode: int) -> Iterator[str]:
    """Describes a file as what it belongs to."""
    if path.suffix == ".gguf":
        return _describe_gguf(path)
    if path.name == "tokenizer.json" or path.suffix in (".model", ".tiktoken"):
        return _describe_tokenizer(path)
    tokens = path.with_suffix("") if path.suffix == ".meta" else path.with_suffix(".bin") if path.suffix == ".idx" else path
    if tokens.suffix == ".bin" and tokens.is_file() and meta_path(tokens).is_file():
        return describe_dataset(tokens.with_suffix(""), tokenizer, decode)
    return describe_raw(path, find_files([path], None, None, ()))


def _is_run(path: Path) -> bool:
    return (path / "metrics.jsonl").is_file() or (path / "checkpoints").is_dir()


def _runs_below(path: Path) -> list[Path]:
    """Returns the run folders in a folder; none if it has tokenized data beside them, which is then what it is about."""
    runs = sorted(folder for folder in path.iterdir() if folder.is_dir() and _is_run(folder))
    beside = (file for file in path.rglob("*.bin") if not any(run in file.parents for run in runs))
    return runs if runs and next(beside, None) is None else []


def _describe_runs(path: Path, runs: list[Path]) -> Iterator[str]:
    """One line for each run. ``inspect`` of the run says more, and reads its checkpoints."""
    yield f"{counted(len(runs), 'run')} in {path}:"
    width = max(len(run.name) for run in runs)
    for run in runs:
        data = RunData.read(run)
        total, last = data.options().get("data.total_steps"), data.train[-1] if data.train else None
        of = f" of {total:,}" if isinstance(total, int) else ""
        step = f"step {last['step']:,}{of}, {_loss(last['loss'])}" if last else "no step yet"
        yield f"  {run.name:{width}}  {step}; {counted(len(complete_checkpoints(run)), 'checkpoint')}"


def _loss(value: float | None) -> str:
    return "no loss" if value is None else f"loss {value:.4f}"


def _describe_checkpoint(path: Path) -> Iterator[str]:
    checkpoint = Checkpoint(path)
    manifest = checkpoint.manifest
    yield f"checkpoint {path}: step {manifest.step}"
    yield f"model: {checkpoint.config.summary()}, {_dtypes(checkpoint)}"
    if lora := checkpoint.config.lora:
        yield f"adapters (LoRA): rank {lora.rank}, alpha {lora.alpha:g}, targets: {', '.join(lora.targets)}"
    kinds = sorted({name.split("/")[0] for name in manifest.tensors})
    size = sum(f.size for f in manifest.files.values())
    tensors, files = counted(len(manifest.tensors), "tensor"), counted(len(manifest.files), "file")
    yield f"contains: {', '.join(kinds)}; {tensors} in {files}, {size / 1e6:,.1f} MB"
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
    yield f"run {path}: {counted(len(rows), 'step')}"
    if damaged:
        yield f"damaged: {counted(damaged, 'line')} of {file}, left out here"
    if rows:
        step, loss, tokens = (rows[-1][key] for key in ("step", "loss", "consumed_tokens"))
        yield f"last step: {step}, {_loss(loss)}, {counted(tokens, 'token')}"
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
    yield f"intact: all {counted(len(folder.naming.shapes), 'tensor')} can be read, {read:,} values"


def _describe_adapters(path: Path) -> Iterator[str]:
    values, file = read_object(path / peft.CONFIG), TensorFile(path / peft.WEIGHTS)
    base, targets = values.get("base_model_name_or_path"), values.get("target_modules")
    yield f"adapters of the peft library {path}: {values.get('peft_type')}, for the model {base or '(not named)'}"
    named = ", ".join(map(str, targets)) if isinstance(targets, list) else targets
    yield f"rank: {values.get('r')}, alpha: {values.get('lora_alpha')}, targets: {named}"
    read = sum(file.read(name, 0, spec.rows).numel() for name, spec in file.specs.items())
    yield f"intact: all {counted(len(file.specs), 'tensor')} can be read, {read:,} values"


def _describe_gguf(path: Path) -> Iterator[str]:
    reader = gguf.open_gguf(path)
    architecture = reader.fields["general.architecture"].contents()
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    yield f"GGUF model {path}: {architecture}, {sum(int(tensor.n_elements) for tensor in reader.tensors):,} parameters"
    yield f"tokenizer: {'yes' if 'tokenizer.ggml.tokens' in reader.fields else 'no'}"
    yield "intact: the file is as long as its tensors: " + ", ".join(
        f"{count} in {kind}" for kind, count in kinds.most_common()
    )


def _describe_tokenizer(path: Path) -> Iterator[str]:
    tokenizer = load_tokenizer(path)
    yield f"tokenizer {path}: vocabulary {tokenizer.vocab_size:,}"
    ends = [(what, id_) for what, id_ in (("begin", tokenizer.bos_id), ("end", tokenizer.eos_id)) if id_ is not None]
    marks = [f"{what} with {tokenizer.decode([id_])!r} (id {id_})" for what, id_ in ends]
    yield f"documents {' and '.join(marks) or 'have no token at their ends'}"
    yield f"chat template: {'yes' if templates(path if path.is_dir() else path.parent) else 'no'}"
