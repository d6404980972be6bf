"""Copies a model's tokenizer with the model, and finds its special ids for ``config.json``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ...storage.jsonfile import replace_json, write_json
from ...text.special_tokens import MODEL_KEYS, SETTINGS, is_ids, model_eos_ids, read_optional
from ...text.tokenizer import FILES, TEMPLATES, load_tokenizer

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "generation_config.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
RANK_FILES = "*.tiktoken"
CODE_FILES = ("configuration_*.py", "modeling_*.py", "tokenization_*.py")
"""A family's own code for transformers. It is copied, and never run."""
SPECIAL_IDS = tuple(key for key in MODEL_KEYS if key.endswith("_id"))


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder contains a tokenizer."""
    return any((folder / name).is_file() for name in (*FILES, "vocab.json", "vocab.txt")) or any(folder.glob(RANK_FILES))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a tokenizer to ``folder``, which can then be opened as a tokenizer.

    Args:
        source: a tokenizer file, or a folder, of which the tokenizer's files and the code files are copied. Of its
            ``config.json`` the copy has what is about the tokenizer.

    Raises:
        UsageError: if ``config.json`` is damaged. Nothing is copied then.
    """
    home = _folder_of(source)
    model = read_optional(home / "config.json")
    folder.mkdir(parents=True, exist_ok=True)
    whole = source.is_dir() or source.name in TOKENIZER_FILES
    paths = {home / name: name for name in (TOKENIZER_FILES if whole else SETTINGS)}
    if source.is_dir():
        patterns = (RANK_FILES, TEMPLATES, *CODE_FILES)
        paths |= {path: str(path.relative_to(home)) for pattern in patterns for path in home.glob(pattern)}
    elif not whole:  # a tokenizer in a folder is found by these names
        paths[source] = f"tokenizer{source.suffix}" if source.suffix in (".json", ".model") else source.name
    for path, name in paths.items():
        if path.is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
    if of_tokenizer := {key: model[key] for key in MODEL_KEYS if key in model}:
        write_json(folder / "config.json", of_tokenizer, indent=2)


def special_ids(tokenizer: Path) -> dict[str, Any]:
    """Returns the special ids for ``config.json``: those in the folder's own config, or otherwise those of its tokenizer.

    Each is a whole number, or a list of them.

    Raises:
        UsageError: if a config is damaged, or it has no ids and the tokenizer cannot be opened.
    """
    home = _folder_of(tokenizer)
    for name in ("config.json", "generation_config.json"):
        known = read_optional(home / name)
        if ids := {key: known[key] for key in SPECIAL_IDS if is_ids(known.get(key))}:
            return ids
    found = load_tokenizer(tokenizer)
    ids = {"bos_token_id": found.bos_id, "eos_token_id": found.eos_id}
    return {key: value for key, value in ids.items() if value is not None}


def add_end(folder: Path, id_: int) -> None:
    """Adds an id to those that end a text, in what a tokenizer's folder says about the model: ``generation_config.json``, which
    transformers and vLLM read, and ``config.json``, which others do. The folder's end token stays the one that ends documents.

    Raises:
        UsageError: as ``special_ids``.
    """
    ids = special_ids(folder)
    known = model_eos_ids(folder) or [id_ for id_ in (ids.get("eos_token_id"),) if id_ is not None]
    if id_ in known:
        return
    ids["eos_token_id"] = [*known, id_]
    for name in ("generation_config.json", "config.json"):
        replace_json(folder / name, {**read_optional(folder / name), **ids}, indent=2)


def _folder_of(tokenizer: Path) -> Path:
    return tokenizer if tokenizer.is_dir() else tokenizer.parent
