"""Waiting for a save that is running: at the end of a run, interrupted by Ctrl-C, and after the run has failed."""

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint import CheckpointException

from internevo.checkpoint.saver import Saver
from internevo.config.run import Ckpt
from internevo.errors import CheckpointError


@pytest.fixture
def saver(tmp_path: Path) -> Saver:
    """A saver with a save that does not end by itself."""
    saver = Saver(tmp_path, Ckpt(), 0, {}, group=None)  # type: ignore[arg-type]
    saver.pending, saver.temporary = Future(), tmp_path / "temporary"
    saver.temporary.mkdir()
    return saver


def pending(saver: Saver) -> "Future[Any]":
    assert saver.pending is not None
    return saver.pending


def soon(act: Callable[[], None]) -> None:
    threading.Timer(0.05, act).start()


def test_a_save_that_fails_is_an_error_and_its_folder_is_removed(saver: Saver) -> None:
    failure = CheckpointException("write", {1: (OSError("disk full"), None)})  # type: ignore[dict-item]
    soon(lambda: pending(saver).set_exception(failure))
    with pytest.raises(CheckpointError, match=r"earlier ones are untouched: disk full"):
        saver.wait()
    assert saver.pending is None and not saver.temporary.exists()
    saver.wait()  # nothing to wait for any more


def test_ctrl_c_ends_the_waiting_and_not_the_save(saver: Saver) -> None:
    soon(lambda: os.kill(os.getpid(), signal.SIGINT))  # to the main thread, as a terminal does
    with pytest.raises(KeyboardInterrupt):
        saver.wait()
    assert saver.temporary.exists()
    soon(lambda: pending(saver).set_result(None))
    saver.wait()
    assert saver.pending is None


def test_after_a_failure_a_save_is_waited_for(saver: Saver) -> None:
    soon(lambda: pending(saver).set_result(None))
    saver.finish(60)
    assert pending(saver).done()


def test_after_a_failure_a_save_that_does_not_end_is_abandoned(saver: Saver) -> None:
    saver.finish(0.05)
    assert not pending(saver).done()


def test_after_a_failure_the_error_of_a_save_is_not_raised(saver: Saver) -> None:
    pending(saver).set_exception(CheckpointException("write", {}))
    saver.finish(60)
