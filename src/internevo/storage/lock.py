"""A lock file, by which one process uses a folder at a time, on one machine or on several that share a file system.

The process that uses the folder locks the file (``flock``), and the kernel unlocks it when the process ends, however it ends.
The file also says who has the lock. On some shared file systems a machine does not see the locks of others. So the holder also
changes the time of the file regularly, and a process on another machine waits to see whether the holder still does.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from ..errors import InternEvoError, UsageError

INTERVAL, PATIENCE = 10.0, 60.0
"""Seconds between two signs of life of a holder; and seconds without one after which it has ended."""
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""Errors of file systems without locks."""


class FileLock:
    """A lock that this process holds until ``release``, or until it ends. It is a context, which releases it."""

    def __init__(self, path: Path, descriptor: int, content: str) -> None:
        """Makes the lock of a file that is locked already. ``content``: what the file says about the holder."""
        self.path, self.descriptor, self.content = path, descriptor, content
        os.set_inheritable(descriptor, False)
        self.taken_by = ""
        """Who has the lock now, if this process has lost it."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._show_life, name="lock", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, path: Path, say: Callable[[str], None]) -> FileLock:
        """Locks the file ``path``, which is made if it is missing.

        Args:
            say: is called with a line for the user before this waits.

        Raises:
            UsageError: if another process holds the lock. The message says which.
            OSError: if the file cannot be written.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            free = _lock(descriptor, path)
            before = _read(path)
            if before and not (free and _parse(before).get("boot") == _boot()) and _is_alive(path, say):
                raise _in_use(path)
            values = {
                "host": socket.gethostname(), "process": os.getpid(), "boot": _boot(), "token": secrets.token_hex(8),
                "since": datetime.now().astimezone().isoformat(" ", "seconds"),
            }  # fmt: skip
            content = json.dumps(values)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, content.encode(), 0)
            return cls(path, descriptor, content)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def inherit(cls, path: Path, descriptor: int) -> FileLock:
        """Returns the lock that the process which has started this one has acquired, and passed on as an open file."""
        return cls(path, descriptor, _read(path))

    def check(self) -> None:
        """Checks that no other process has taken the lock, which it may after this one was suspended for a long time.

        Raises:
            InternEvoError: if one has.
        """
        if self.taken_by:
            raise InternEvoError(
                f"{self.path.parent} has been taken over by {self.taken_by}, because this process gave no sign of life for "
                f"{PATIENCE:.0f} s or started at the same time; this one ends and saves nothing more"
            )

    def release(self) -> None:
        """Gives the lock back. If another process has inherited it, that one still holds it."""
        self._over.set()
        self._thread.join()
        if not self.taken_by and _read(self.path) == self.content:
            with suppress(OSError):  # a full or lost disk; the next holder then waits for a sign of life
                os.ftruncate(self.descriptor, 0)
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _show_life(self) -> None:
        while not self._over.wait(INTERVAL):
            content = _read(self.path)
            if content not in ("", self.content):
                self.taken_by = _describe(content)
                return
            with suppress(OSError):
                os.utime(self.descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    """Locks an open file. Returns False if its file system has no locks.

    Raises:
        UsageError: if another process has locked it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(path) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _in_use(path: Path) -> UsageError:
    for _ in range(20):
        if content := _read(path):
            break
        time.sleep(0.05)  # the holder has locked the file, and writes to it next
    return UsageError(
        f"{path.parent} is in use by {_describe(content)}. Only one run may write to it: wait until that one has ended, or "
        "choose another folder"
    )


def _is_alive(path: Path, say: Callable[[str], None]) -> bool:
    """Whether the holder that the file names gives a sign of life."""
    before, end = _sign(path), time.monotonic() + PATIENCE
    who = _describe(before[0])
    say(f"{path.parent} was last used by {who}; waiting up to {PATIENCE:.0f} s to see whether it still runs")
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 10))
        if _sign(path) != before:
            return True
    return False


def _sign(path: Path) -> tuple[str, int]:
    """Returns what a holder changes."""
    return _read(path), path.stat().st_mtime_ns  # a network file system asks the server when a file is opened


def _describe(content: str) -> str:
    holder = _parse(content)
    if not holder:
        return "a process that is starting or ending"
    return f"process {holder.get('process')} on host {holder.get('host')}, since {holder.get('since')}"


def _parse(content: str) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _boot() -> str:
    """Returns what identifies the running kernel. It knows the locks of all its processes, in whatever container they are."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
