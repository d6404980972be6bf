"""One process has the lock; a killed one leaves none; on other machines signs of life count."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from internevo.errors import InternEvoError, UsageError
from internevo.storage import lock
from internevo.storage.lock import FileLock

HOLD = """
import sys, time
from pathlib import Path
from internevo.storage.lock import FileLock
path = Path(sys.argv[1])
held = FileLock.inherit(path, int(sys.argv[2])) if len(sys.argv) > 2 else FileLock.acquire(path, print)
print("held", flush=True)
time.sleep(600)
"""


def quiet(line: str) -> None:
    raise AssertionError(f"waits: {line}")


def hold(path: Path, *arguments: object, **more: Any) -> "subprocess.Popen[str]":
    """Starts a process that holds the lock until it is killed."""
    command = [sys.executable, "-c", HOLD, str(path), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **more)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.lock"


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "INTERVAL", 0.01)
    monkeypatch.setattr(lock, "PATIENCE", 0.2)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_the_second_is_refused_with_who_has_it_and_a_killed_holder_does_not_block(path: Path) -> None:
    holder = hold(path)
    with pytest.raises(UsageError, match=rf"in use by process {holder.pid} on host {os.uname().nodename}, since 20\d\d-"):
        FileLock.acquire(path, quiet)
    os.kill(holder.pid, signal.SIGSTOP)  # suspended is not ended
    with pytest.raises(UsageError, match="in use by"):
        FileLock.acquire(path, quiet)
    end(holder)
    with FileLock.acquire(path, quiet):
        assert json.loads(path.read_text())["process"] == os.getpid()
    assert path.read_text() == ""
    FileLock.acquire(path, quiet).release()


def test_a_process_that_inherits_the_lock_holds_it_after_the_first_has_ended(path: Path) -> None:
    first = FileLock.acquire(path, quiet)
    heir = hold(path, first.descriptor, pass_fds=(first.descriptor,))
    first.release()
    with pytest.raises(UsageError, match="in use by"):
        FileLock.acquire(path, quiet)
    end(heir)
    FileLock.acquire(path, quiet).release()


def elsewhere(path: Path) -> None:
    """Writes what a process on another machine has written."""
    path.write_text(json.dumps({"host": "gpu7", "process": 12, "since": "yesterday", "boot": "another", "token": "0"}))


@pytest.mark.usefixtures("fast")
def test_a_holder_on_another_machine_without_a_sign_of_life_has_ended(path: Path) -> None:
    elsewhere(path)
    lines: list[str] = []
    with FileLock.acquire(path, lines.append):
        assert json.loads(path.read_text())["process"] == os.getpid()
    assert len(lines) == 1 and "process 12 on host gpu7, since yesterday" in lines[0]


@pytest.mark.usefixtures("fast")
def test_a_holder_on_another_machine_that_gives_signs_of_life_is_named(path: Path) -> None:
    elsewhere(path)
    before = path.read_text()
    with pytest.raises(UsageError, match="in use by process 12 on host gpu7, since yesterday"):
        FileLock.acquire(path, lambda line: os.utime(path, (1, 1)))
    assert path.read_text() == before


@pytest.mark.usefixtures("fast", "no_locks")
def test_without_locks_in_the_file_system_signs_of_life_decide(path: Path) -> None:
    with FileLock.acquire(path, quiet), pytest.raises(UsageError, match=f"in use by process {os.getpid()} "):
        FileLock.acquire(path, lambda line: None)
    FileLock.acquire(path, quiet).release()


@pytest.mark.usefixtures("fast")
def test_a_holder_whose_lock_was_taken_notices_it_and_leaves_the_other_one_alone(path: Path) -> None:
    held = FileLock.acquire(path, quiet)
    held.check()
    elsewhere(path)
    while not held.taken_by:
        time.sleep(0.01)
    with pytest.raises(InternEvoError, match="taken over by process 12 on host gpu7"):
        held.check()
    held.release()
    assert "gpu7" in path.read_text()


@pytest.mark.parametrize("content", ["", "[1]", "{}", "\x00" * 40, '{"boot": 3}'])
@pytest.mark.usefixtures("fast")
def test_a_damaged_file_does_not_block(path: Path, content: str) -> None:
    path.write_text(content)
    FileLock.acquire(path, lambda line: None).release()
