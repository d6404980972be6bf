"""Tells the name of a model or dataset on the Hugging Face Hub (owner/name, or owner/name@revision) from the path of a file or
folder."""

from __future__ import annotations

import re
from pathlib import Path

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w-][\w.-]*(/[\w-][\w.-]*)*)?", re.ASCII)
"""A revision may have slashes, as the branches feature/x and refs/pr/3 do."""
FILES = (
    ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zst", ".bin", ".safetensors", ".model",
    ".tiktoken", ".py", ".yaml", ".yml", ".toml",
)  # fmt: skip
"""Suffixes of files. Nothing on the hub has a name with one of them."""


def may_be_on_hub(name: str | None) -> bool:
    """Whether this has the form of a name on the hub, and cannot be a path: neither it nor its first folder exists here.

    What begins with ./, ../ or / is always a path.
    """
    if name is None or NAME.fullmatch(name) is None or name.endswith(FILES):
        return False
    return not Path(name).exists() and not Path(name.split("/")[0]).exists()


def split_revision(name: str) -> tuple[str, str | None]:
    """Splits owner/name@revision, the name of something on the hub, into owner/name and the revision."""
    repository, _, revision = name.partition("@")
    return repository, revision or None
