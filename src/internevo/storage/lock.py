"""A lock on a file, so that two commands do not write to the same folder. The system releases it when its process ends."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UsageError


@contextmanager
def hold(path: Path, folder: Path) -> Iterator[None]:
    """Holds the lock ``path``, which means that this process writes to ``folder``. The file may be removed while it is held.

    On file systems that have no locks, nothing is locked.

    Raises:
        UsageError: if another process holds the lock; the message says which.
    """
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise UsageError(f"{holder} is writing to {folder}: wait until it has ended, or give another folder") from None
            except OSError:
                pass  # the file system has no locks
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # the process that held the lock removed the file after it was opened here
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} (since {time.strftime('%Y-%m-%d %H:%M:%S')})")
            file.flush()
            yield
            return
