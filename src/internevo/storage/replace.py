"""Files that are replaced at once: each has its old or its new content at every moment."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from .naming import naming


def replace_text(path: Path, text: str, errors: str = "strict") -> None:
    """Writes a file, which may exist. It has the old or the new text, also if the process is killed or the power fails.

    Args and errors as ``replace_pieces``.
    """
    replace_pieces(path, [text], errors)


def replace_pieces(path: Path, pieces: Iterable[str], errors: str = "strict") -> None:
    """Does the same with a text that comes in pieces.

    Args:
        errors: what is done with characters that UTF-8 does not have (lone surrogates), as for ``open``.

    Raises:
        OSError: if it cannot be written. The old text is still there.
    """
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with naming(new), open(new, "w", encoding="utf-8", errors=errors) as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
