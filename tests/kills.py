"""Kills a process at every moment at which it changes a file."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "shutil.rmtree"}
"""Python's audit events before such changes (https://docs.python.org/3/library/audit_events.html)."""


def kill_at_every_moment(
    folder: Path, prepare: Callable[[Path], object], act: Callable[[Path], object], check: Callable[[Path], object]
) -> int:
    """Kills a process before each of its changes, and checks what it leaves.

    For every n, in a new folder below ``folder``: calls ``prepare(path)``; runs ``act(path)`` in a new process, which is killed
    before its n-th change; and calls ``check(path)``. The last process is not killed, because it has no n-th change.

    Returns:
        The number of changes.
    """
    moment, code = -1, 9
    while code == 9:
        moment += 1
        path = folder / f"moment-{moment}"
        path.mkdir()
        prepare(path)
        code = _run(act, path, moment)
        check(path)
    assert code == 0
    return moment


def _run(act: Callable[[Path], object], path: Path, moment: int) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    remaining = moment

    def hook(event: str, _: object) -> None:
        nonlocal remaining
        if event in CHANGES:
            if remaining == 0:
                os._exit(9)
            remaining -= 1

    sys.addaudithook(hook)
    try:
        act(path)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    os._exit(code)
