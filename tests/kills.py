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
    """For every moment n: ``prepare(place)``, ``act(place)`` in a process of its own that is killed before its n-th change,
    and ``check(place)``; last, with a process that was not killed.

    Returns:
        The number of moments.
    """
    moment, code = -1, 9
    while code == 9:
        moment += 1
        place = folder / f"moment-{moment}"
        place.mkdir()
        prepare(place)
        code = _run(act, place, moment)
        check(place)
    assert code == 0
    return moment


def _run(act: Callable[[Path], object], place: Path, moment: int) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = moment

    def hook(event: str, _: object) -> None:
        nonlocal left
        if event in CHANGES:
            if left == 0:
                os._exit(9)
            left -= 1

    sys.addaudithook(hook)
    try:
        act(place)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    os._exit(code)
