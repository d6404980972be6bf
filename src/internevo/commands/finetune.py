"""``internevo finetune``: from a pretrained model and data to a better model, in one command.

What it writes is in one run folder: the tokenized ``data``, ``config.py``, what every run writes, and the exported ``model``.
Each step is done once. If the command is killed, the same command goes on where it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint, complete_checkpoints
from ..data.encoding.describe import RawData, fits, needs
from ..data.encoding.formats import FormatName, encode_documents
from ..data.encoding.tokenize import tokenize, valid_ratio_for
from ..data.raw.hub import dataset_files
from ..data.rows import tokens_and_labels
from ..data.tokenized.describe import decoded
from ..data.tokenized.index import Index, open_index
from ..errors import DataError, InternEvoError, UsageError
from ..models.huggingface.tokenizer import copy_tokenizer, has_tokenizer
from ..observe.metrics import usable_rows
from ..ops.precision import DTYPES
from ..parallel.launcher import read_launcher
from ..storage.folders import check_target, clean_up, set_aside
from ..storage.hub import model_folder
from ..storage.jsonfile import read_object, replace_json
from ..storage.lock import FileLock
from ..text.chat import has_template
from ..text.tokenizer import TEMPLATE, Tokenizer, load_tokenizer
from ..train.config import HfModel, load_config
from ..train.due import Due
from ..train.folder import CONFIG, FINETUNE, LOCK
from ..train.resume import TOKENIZER
from ..wording import counted
from .config_from_hf import describe
from .convert import convert
from .finetune_config import DATA, MODEL, Chosen, Options, check_overrides
from .launch import default_processes
from .printing import say
from .progress import progress_bar
from .train import train

EXAMPLES, SHOWN, LOOKED_AT = 3, 1000, 1000
"""Number of documents that are shown; and how many characters of each; and number of documents of which it is counted how many
tokens are predicted."""
EXPORTED = "exported step"
"""Key of ``finetune.json``, besides the options: the step whose model has been exported."""


def finetune(options: Options, run: Path, processes: int | None) -> int:
    """Prepares the data, trains, and exports the model. What a killed command has done is not done again.

    Args:
        run: the run folder.
        processes: number of local processes; None: one per GPU, or 1.

    Returns:
        The exit code.

    Raises:
        UsageError: if the model, the data or the options cannot be used, or ``run`` is another run's.
    """
    if options.chat_template is not None and not Path(options.chat_template).is_file():
        raise UsageError(f"--chat-template {options.chat_template} is not a file")
    if read_launcher(os.environ).address is not None:
        raise UsageError("finetune starts its processes itself: run it once, without torchrun or srun, with --nproc N")
    processes, begun = processes or default_processes(), _begun(run)
    if begun is not None:
        with _locked(run):
            _check_same(options, begun, run)
    elif not _is_locked_only(run):
        check_target(run, advice="give another --output")
    if not (run / CONFIG).is_file():
        _prepare(options, run, processes, begun)
    else:
        say(f"going on with {run}")
    config = load_config(run / CONFIG)
    total = config.data.total_steps
    if (step := _last_step(run)) >= total and not Due.left_over(config, step, total):
        say(f"{total:,} of {counted(total, 'step')} are done")
    elif code := train(run / CONFIG, [], processes):
        return code
    if (step := _last_step(run)) < total:
        say(f"step {step} of {total} is done, and no model is exported yet; the same command goes on")
        return 0
    if left := Due.left_over(config, step, total):
        say(f"no model is exported yet, and what is left of the last step is {left}; the same command goes on")
        return 0
    with _locked(run):
        _export(options, run, step)
    for line in _summary(options, run):
        say(line)
    return 0


def _locked(run: Path) -> FileLock:
    """Returns the lock of the run folder: no other command uses it at the same time."""
    return FileLock.acquire(run / LOCK, say=print)


def _begun(run: Path) -> dict[str, Any] | None:
    """Returns what ``finetune.json`` says of the command that has begun in this folder; None if none has."""
    return read_object(run / FINETUNE) if (run / FINETUNE).is_file() else None


def _is_locked_only(run: Path) -> bool:
    """Whether a command has begun here, and was killed before it wrote anything."""
    return run.is_dir() and os.listdir(run) == [LOCK]


def _last_step(run: Path) -> int:
    """Returns the step of the newest checkpoint; 0 without one."""
    checkpoints = complete_checkpoints(run)
    return Checkpoint(checkpoints[0]).manifest.step if checkpoints else 0


def _check_same(options: Options, saved: dict[str, Any], run: Path) -> None:
    """Checks that a run goes on with the same options. One that has saved no checkpoint is begun again with other options."""
    wanted = asdict(options)
    changed = [f"{key} = {saved.get(key)!r}, and not {value!r}" for key, value in wanted.items() if saved.get(key) != value]
    if changed and complete_checkpoints(run):
        raise UsageError(f"{run} was begun with {'; '.join(changed)}: give the same options to go on, or another --output")
    if changed:
        say(f"{run} was begun with {'; '.join(changed)}, and has saved nothing: beginning again")
        for old in (run / CONFIG, run / DATA, run / TOKENIZER):
            if old.exists():
                say(f"what was there is now {set_aside(old)}")


# Data ----------------------------------------------------------------------------------------------------------------


def _prepare(options: Options, run: Path, processes: int, begun: dict[str, Any] | None) -> None:
    """Tokenizes the data, says what it found, and writes the config. All that may be wrong is checked before.

    Args:
        begun: what ``finetune.json`` said when this command looked at the folder.

    Raises:
        UsageError: if something cannot be used, or another command has begun in the folder since.
    """
    found = HfModel.find({"model": {"from_hf": options.model}}, "MODEL")
    check_overrides(options, found, processes)
    say(f"model: {describe(found.decoder)}")
    place = _tokenizer_of(options, found)
    tokenizer = load_tokenizer(place)
    if not tokenizer.fits(found.decoder.vocab_size):
        raise UsageError(
            f"the tokenizer {place} has {tokenizer.vocab_size:,} entries, and the model {found.decoder.vocab_size:,}"
        )
    with _with_template(place, options.chat_template) as folder:
        tokenizer = tokenizer if folder == place else load_tokenizer(folder)
        raw = RawData.read(dataset_files(options.data, options.subset, "train")[1])
        name = _format(options, raw, has_template(tokenizer))
        say(f"data: {options.data}: {_count(raw)}, read as {_meaning(name, raw)}")
        _check_beginning(name, raw, options, tokenizer)
    run.mkdir(parents=True, exist_ok=True)
    with _locked(run):
        if _begun(run) != begun or (run / CONFIG).is_file():
            raise UsageError(f"another command has begun in {run} meanwhile: wait until it has ended, or give another --output")
        replace_json(run / FINETUNE, asdict(options), indent=1)
        if options.chat_template is not None:
            _copy_with_template(place, Path(options.chat_template), run / TOKENIZER)
            place = run / TOKENIZER
        _tokenize(options, run, raw, name, place)
        train_data = open_index(run / DATA / "train")
        _describe(train_data, load_tokenizer(place))
        for line in Chosen.of(options, found, train_data, processes).write_config(run, place, processes):
            say(line)


def _tokenizer_of(options: Options, found: HfModel) -> Path:
    """Returns the tokenizer's path."""
    if options.tokenizer is not None:
        return model_folder(options.tokenizer, weights=False)
    if has_tokenizer(found.folder):
        return found.folder.resolve()
    raise UsageError(f"{found.name} has no tokenizer; copy its files there, or give --tokenizer PATH")


def _copy_with_template(tokenizer: Path, template: Path, folder: Path) -> None:
    """Copies a tokenizer to a folder, with another chat template."""
    try:
        text = template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--chat-template {template} cannot be read: {error}") from error
    if not text.strip():
        raise UsageError(f"--chat-template {template} is empty")
    copy_tokenizer(tokenizer, folder)
    (folder / TEMPLATE).write_text(text, encoding="utf-8")


@contextmanager
def _with_template(tokenizer: Path, template: str | None) -> Iterator[Path]:
    """Gives a tokenizer's path: with another chat template, that of a temporary copy. Errors name the template in its place."""
    if template is None:
        yield tokenizer
        return
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tokenizer"
        _copy_with_template(tokenizer, Path(template), folder)
        try:
            yield folder
        except InternEvoError as error:
            raise type(error)(str(error).replace(str(folder), template)) from error


def _format(options: Options, raw: RawData, templated: bool) -> FormatName:
    """Returns the format by which the documents are encoded: instructions are chats, if there is a chat template."""
    if not raw.documents:
        raise raw.errors[0] if raw.errors else DataError(f"{options.data} has no document")
    found = options.format if options.format != "auto" else raw.format(options.text_key)
    if found is None:
        fields = ", ".join(raw.fields()) or "no fields"
        ways = "; ".join(f"{name} needs {needs(name)}" for name in ("chat", "alpaca", "text"))
        raise UsageError(f"no format fits the data, which has {fields}: {ways}")
    name = "chat" if found == "alpaca" and templated else found
    if name == "chat" and not templated:
        raise UsageError("the data has chats, and the tokenizer has no chat template: give --chat-template FILE (Jinja)")
    return name  # type: ignore[return-value]


def _count(raw: RawData) -> str:
    kinds = ", ".join(sorted({kind for kind, _ in raw.files}))
    more = "" if raw.whole else " at the beginning"
    return f"{counted(len(raw.files), 'file')} ({kinds}), {counted(len(raw.documents), 'document')}{more}"


def _meaning(name: FormatName, raw: RawData) -> str:
    what = "instructions" if sum(fits("alpaca", document) for document in raw.documents) * 2 > len(raw.documents) else "chats"
    return {
        "text": "texts; all tokens are predicted",
        "chat": f"{what}, with the chat template; what the assistant says is predicted",
        "alpaca": "instructions, with InternEvo's own template (there is no chat template); the output is predicted",
    }[name]


def _check_beginning(name: FormatName, raw: RawData, options: Options, tokenizer: Tokenizer) -> None:
    """Raises the first error at the beginning of the data, before all of it is tokenized."""
    results = encode_documents(name, raw.documents[:100], options.text_key, tokenizer)
    errors = [*(result for result in results if isinstance(result, DataError)), *raw.errors]
    if errors and (options.on_error == "stop" or len(errors) == len(results) + len(raw.errors)):
        raise errors[0]


def _tokenize(options: Options, run: Path, raw: RawData, name: FormatName, tokenizer: Path) -> None:
    """Tokenizes the data into RUN/data/train and RUN/data/valid: the split of the dataset, or a part that is held out."""
    files, held_out, ratio = [path for _, path in raw.files], _valid_files(options), 0.0
    if not held_out:
        ratio = valid_ratio_for(raw.count) if options.valid_ratio is None else options.valid_ratio
    parts = [("train", files), ("valid", held_out)] if held_out else [("" if ratio else "train", files)]
    for part, inputs in parts:
        with progress_bar("tokenizing") as (progress, status):
            result = tokenize(
                inputs, run / DATA / part, tokenizer=tokenizer, kind=raw.files[0][0], format=name, text_key=options.text_key,
                dataset_type=name, valid_ratio=0.0 if part else ratio, overwrite=True, on_error=options.on_error,
                status=status, progress=progress,
            )  # fmt: skip
        if part == "valid":
            say(f"to evaluate on: {counted(result.documents, 'document')}, {result.tokens:,} tokens (the dataset's own)")
        else:
            say(f"for training: {counted(result.documents, 'document')}, {result.tokens:,} tokens")
            held = f"{counted(result.valid_documents, 'document')}, {result.valid_tokens:,} tokens" if ratio else "none"
            if not held_out:
                say(f"held out, to evaluate on: {held}")
        if result.skipped:
            say(f"left out: {counted(result.skipped, 'document')} that cannot be read (see above)")
        if result.empty:
            say(f"left out: {counted(result.empty, 'empty document')}")
    if not any((run / DATA / "train").rglob("*.bin")):
        raise DataError(f"there is no document to train on in {options.data}, without those that are held out (--valid-ratio)")


def _valid_files(options: Options) -> list[Path]:
    """Returns the files of the dataset's own validation split; none if it has no such split, or another share is wanted."""
    if options.valid_ratio is not None:
        return []
    try:
        return [path for _, path in dataset_files(options.data, options.subset, "valid", trained_on=True)[1]]
    except DataError:
        return []


def _describe(index: Index, tokenizer: Tokenizer) -> None:
    """Prints how long the documents are, what of them is predicted, and the beginnings of some."""
    lengths = index.documents[:, 1]
    sampled = [tokens_and_labels(index.read(number))[1] for number in range(min(len(index), LOOKED_AT))]
    predicted = sum(int((labels >= 0).sum()) for labels in sampled) / sum(map(len, sampled))
    say(
        f"lengths in tokens: median {np.median(lengths):,.0f}, 95% {np.percentile(lengths, 95):,.0f}, longest "
        f"{lengths.max():,}; {predicted:.0%} of the tokens are predicted"
    )
    say("examples; what is in ⟦ ⟧ is read, and the rest is predicted:")
    for text in decoded(index, tokenizer, EXAMPLES):
        more = len(text) - SHOWN
        print(text if more <= 0 else f"{text[:SHOWN]} ... (and {counted(more, 'character')} more)")


# Result --------------------------------------------------------------------------------------------------------------


def _export(options: Options, run: Path, step: int) -> None:
    """Writes the trained model as a Hugging Face folder, in the dtype of the model that it was made from, unless that of this
    step is there. That it is, is written down last."""
    if read_object(run / FINETUNE).get(EXPORTED) == step and (run / MODEL / "config.json").is_file():
        return
    clean_up(run, MODEL)  # what killed commands have left
    clean_up(run / MODEL, "new")
    try:
        dtype = HfModel.find({"model": {"from_hf": options.model, "pretrained": False}}).dtype
    except UsageError:  # the run was taken elsewhere, and the model was not
        dtype = load_config(run / CONFIG).model.dtype
    with progress_bar("exporting") as (progress, _):
        convert(run, run / MODEL, "hf", dtype=DTYPES.get(dtype or ""), overwrite=True, progress=progress)
    replace_json(run / FINETUNE, {**asdict(options), EXPORTED: step}, indent=1)


def _summary(options: Options, run: Path) -> Iterator[str]:
    losses, _ = usable_rows(run / "metrics.jsonl", {"valid_loss": float, "valid_ppl": float})
    if losses:
        first, last = losses[0], losses[-1]
        before = f"{first['valid_loss']:.4f} (perplexity {first['valid_ppl']:.2f})"
        after = f"{last['valid_loss']:.4f} (perplexity {last['valid_ppl']:.2f})"
        yield f"loss on the documents that were held out: {before} before, {after} after {counted(last['step'], 'step')}"
    checkpoint = complete_checkpoints(run)[0]
    if options.lora is not None:
        yield f"adapters: {checkpoint}; they are merged in the model"
    yield f"model: {run / MODEL} (Hugging Face's format, with the tokenizer)"
    kind = next((run / DATA / "train").glob("*/*.bin")).parent.name
    command = "chat {}" if kind == "chat" else f"generate {{}} --format {kind} --prompt '...'"
    yield f"try it: internevo {command.format(run / MODEL)}"
