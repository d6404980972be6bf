"""Errors of reading and writing files say which file they are about."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds ``path`` to an ``OSError`` that names no file.

    Errors of opening a file name it, and those of writing to it (a full disk) do not.

    Raises:
        OSError: the error, with ``path`` as its file name.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
