"""The file in a folder of tokenized data that says with which tokenizer the data was made."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path

from ...errors import UsageError
from ...storage.jsonfile import read_object, write_json
from ...text.tokenizer import Tokenizer, load_tokenizer, tokenizer_fingerprint

NAME = "tokenized.json"
"""The name of the file."""


@dataclass(frozen=True)
class Origin:
    """How tokenized data was made."""

    tokenizer: str
    """The path of the tokenizer."""
    fingerprint: str
    """``tokenizer_fingerprint`` at that time."""
    format: str
    folders: list[str]
    """The folders of the data, relative to that of the file."""
    template_date: str | None = None
    """Of chats: the date that the chat template took for today. Older files do not say it."""

    @classmethod
    def of(cls, tokenizer: Path, format: str, folders: list[str], template_date: str) -> Origin:
        """Returns the origin of data that is made now."""
        date = template_date if format == "chat" else None
        return cls(str(tokenizer.resolve()), tokenizer_fingerprint(tokenizer), format, folders, date)

    @classmethod
    def read(cls, folder: Path) -> Origin | None:
        """Reads the file in a folder; None if there is none, or it is another file of this name."""
        with contextlib.suppress(UsageError, TypeError):
            return cls(**read_object(folder / NAME))
        return None

    def write(self, folder: Path) -> None:
        """Writes the file."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / NAME, asdict(self), indent=1)

    def problem(self) -> str:
        """Says what has happened to the tokenizer since then; empty if it is the same."""
        path = Path(self.tokenizer)
        if not path.exists():
            return f"the tokenizer {path}, with which it was tokenized, is no longer there; give --tokenizer PATH"
        if tokenizer_fingerprint(path) != self.fingerprint:
            return f"the tokenizer {path} has changed since it was tokenized, so the text may be wrong"
        return ""

    def load(self) -> Tokenizer | None:
        """Opens the tokenizer; None if it is no longer there."""
        return load_tokenizer(self.tokenizer) if Path(self.tokenizer).exists() else None


def find_origin(root: Path) -> Origin | None:
    """Returns the origin of the data below ``root``, from the file there or in a folder above that is about this data."""
    root = root.resolve()
    for folder in (root, *root.parents[:2]):
        origin, inside = Origin.read(folder), root.relative_to(folder)
        if origin is not None and any(inside in (Path(name), *Path(name).parents) for name in origin.folders):
            return origin
    return None
