"""Checks whether a config can be trained, by the rules of the config and of its family.

It needs no PyTorch, and runs before any process is started.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from ..config import Config
from ..config import check as rules
from ..config.data import STREAMS
from ..data.tokenized.vocabulary import check_ids, find_tokenizer, open_tokenizer
from ..errors import ConfigError, NotAvailableYet, UsageError
from ..models.families import registry
from ..text.tokenizer import Tokenizer, load_tokenizer
from .resume import Recorded


def check(config: Config, world_size: int, new: bool | None = None) -> None:
    """Checks that ``config`` can be trained on ``world_size`` processes.

    Args:
        new: whether it is a new run; None: if its folder has no checkpoint.

    Raises:
        ConfigError: with all problems that were found.
        NotAvailableYet: if the config is right, but needs a feature that this version does not have.
        DataError: if the tokenized data has ids outside the model's vocabulary, or cannot be read.
    """
    missing = rules.missing_paths(config, new=Recorded.of(config) is None if new is None else new)
    if config.enable_tb and find_spec("tensorboard") is None:
        missing.append("enable_tb = True needs the package tensorboard: pip install tensorboard, or set enable_tb = False")
    missing += [
        f'monitor.trackers = {name} needs the package {name}: pip install "internevo[{name}]"'
        for name in config.monitor.trackers if find_spec(name) is None
    ]  # fmt: skip
    if config.monitor.tasks and find_spec("lm_eval") is None:
        missing.append("monitor.tasks needs the package lm-eval: pip install 'internevo[eval]'")
    check_config(config, world_size, missing)
    check_data(config)


def check_config(config: Config, world_size: int, missing: Sequence[str] = ()) -> None:
    """As ``check``, but for the config alone: files and packages need not be there.

    Args:
        missing: problems that are already known.
    """
    wrong = [*problems(config, world_size), *missing]
    if wrong:
        raise ConfigError("the config cannot be trained:\n" + "\n".join(f"  {line}" for line in wrong))
    later = missing_features(config)
    if later:
        raise NotAvailableYet("\n".join(later))


def problems(config: Config, world_size: int) -> list[str]:
    """Returns what contradicts itself in the config, what its family does not allow, and what does not fit the world size."""
    wrong = [*registry.problems(config.model_type, config.model), *rules.problems(config, world_size)]
    return [*wrong, *_vocabulary_problems(config)]


def check_data(config: Config) -> None:
    """Looks for ids outside the model's vocabulary in samples of the tokenized data that the config names and that exists.

    Raises:
        DataError: if there is one, or a file is broken.
    """
    if config.data.on_error != "skip":  # documents with such ids are left out
        for folder in _tokenized_folders(config).values():
            check_ids(folder, config.model.vocab_size)


def _vocabulary_problems(config: Config) -> Iterator[str]:
    """Yields a line for each tokenizer, of the config or stored with its data, that is larger than the model's vocabulary."""
    found: dict[str, Tokenizer] = {}
    path = config.data.tokenizer_path
    try:
        whole = config.monitor.sample_prompts and path and Path(path).exists()
        if path and (tokenizer := load_tokenizer(path) if whole else open_tokenizer(Path(path))) is not None:
            found[f"data.tokenizer_path = {path!r}"] = tokenizer
            yield from _prompt_problems(config, tokenizer)
        for key, folder in _tokenized_folders(config).items():
            if (tokenizer := find_tokenizer(folder)) is not None:
                found[f"the tokenizer ({tokenizer.path}) of {key}"] = tokenizer
    except UsageError as error:
        yield str(error)
    for what, tokenizer in found.items():
        if not tokenizer.fits(config.model.vocab_size):
            yield (
                f"model.vocab_size = {config.model.vocab_size} is smaller than the vocabulary of {what}, which has "
                f"{tokenizer.vocab_size} entries"
            )


def _prompt_problems(config: Config, tokenizer: Tokenizer) -> Iterator[str]:
    """Yields a line for each prompt with a token that the model does not have."""
    vocab = config.model.vocab_size
    for prompt in config.monitor.sample_prompts:
        if (largest := max(tokenizer.with_bos(prompt))) >= vocab:
            yield f"monitor.sample_prompts: {prompt!r} has {tokenizer.describe_outside(largest, vocab)}"


def _tokenized_folders(config: Config) -> dict[str, Path]:
    """Returns the existing folders of tokenized data that the run reads, by their keys in the config."""
    data = config.data
    train, valid = data.folders
    named = {"data.train_folder": None if data.mixture else train, "data.valid_folder": valid if data.valid_every else None}
    folders = {key: folder for key, folder in named.items() if folder and data.type not in STREAMS}
    for number, part in enumerate(data.mixture or []):
        if part.folder and part.kind not in (*STREAMS, "mocked"):
            folders[f"data.mixture.{number}.folder"] = part.folder
    paths = {key: Path(folder) for key, folder in folders.items()}
    return {key: path for key, path in paths.items() if path.is_dir() or Path(f"{path}.bin").is_file()}


def missing_features(config: Config) -> list[str]:
    """Returns the features that the config needs and this version does not have."""
    lines = rules.missing_features(config)
    if config.model_type in registry.LATER:
        lines.append(f"not available yet: models of the family {config.model_type} (model_type)")
    return lines
