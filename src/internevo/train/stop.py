"""Requests to stop or to save: SIGTERM, SIGUSR1, SIGHUP and Ctrl-C on any rank, a launcher that has ended, and InternEvo's stop
file."""

from __future__ import annotations

import os
import re
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UsageError
from ..observe.console import log
from ..observe.record import StepRecord
from ..parallel.launcher import STOP_SIGNALS
from ..storage.naming import naming
from .shared import Shared

TORCHRUN_PATIENCE = 30.0
"""Seconds after a signal until torchrun kills the processes, by default."""


def check_stop_file(path: Path) -> None:
    """Checks that ``path`` can become a stop file: it is missing, empty, or contains a number.

    Raises:
        UsageError: if it is something else, which would be overwritten.
    """
    if not os.path.lexists(path):
        return
    try:
        with open(path, "rb") as file:
            ours = re.fullmatch(rb"\s*(-?[0-9]{1,20}\s*)?", file.read(64))
    except OSError:
        ours = None
    if ours is None:
        raise UsageError(
            f"ckpt.stop_file_path = {str(path)!r} is not a stop file, which contains one number; the run would overwrite it. "
            "Choose the name of a new file"
        )


class StopRequests:
    """Receives requests on this rank. They are shared with all ranks in each step, and all ranks make the same decision."""

    def __init__(self, launcher: int | None = None) -> None:
        """
        Args:
            launcher: process id of the launcher, which is the parent of this process; the run stops when it has ended.
        """
        self.launcher = launcher
        self.asked = ""
        """Why this rank asks to stop: the name of the signal that it has received, for example. Empty if it does not."""
        self.launcher_lost = False
        """Whether the launcher of this rank has ended."""
        self.cut_off = False
        """Whether the run stops because the launcher of any rank has ended, rather than because somebody wants it to."""
        self.file: Path | None = None
        self.on_signal: Callable[[str], None] = lambda name: None
        """Is called from a thread with the name of the first signal, as soon as it comes, whatever the main thread does."""

    def watch(self, file: str) -> None:
        """Reads a stop file in each step. Only rank 0 does so.

        At the start, "0" is written to it. "N" means: save and stop at step N. "-N" means: save at step N and continue.
        """
        self.file = Path(file)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.file):
            self.file.write_text("0")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which signals become requests. A second Ctrl-C interrupts the process immediately. (Only the main thread
        can receive signals; in another one this does nothing.)

        The launcher starts processes with these signals blocked. A signal that comes before this context is delivered
        when the context begins. After the context, such a process ignores them. Thus a request to stop kills no process.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _frame: object) -> None:
            # Nothing more may be done here: the main thread may be anywhere, even in the middle of writing to the log.
            self.asked = signal.Signals(number).name
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            elif number == signal.SIGHUP:
                _leave_terminal()

        heard = [n for n in (*STOP_SIGNALS, signal.SIGINT) if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        old = {number: signal.signal(number, ask) for number in heard}
        blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)
        try:
            with self._announcing(heard):
                yield
        finally:
            for number, handler in old.items():
                signal.signal(number, signal.SIG_IGN if number in blocked else handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    @contextmanager
    def _announcing(self, heard: list[signal.Signals]) -> Iterator[None]:
        """A context in which ``on_signal`` is called. Handlers run only between two lines of Python of the main thread, which
        may be far apart in time. Each signal is also written to a file at once, which a thread reads."""
        read, write = os.pipe()
        os.set_blocking(write, False)

        def announce() -> None:
            told = False
            with open(read, "rb", buffering=0) as file:
                while number := file.read(1):  # to the end of the file: nobody could write to it if it were closed here
                    if number[0] in heard and not told:
                        told = True
                        self.on_signal(signal.Signals(number[0]).name)

        thread = threading.Thread(target=announce, name="signals", daemon=True)
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(write)  # which ends the thread

    def is_orphan(self) -> bool:
        """Whether the launcher has ended."""
        return self.launcher is not None and os.getppid() != self.launcher

    def launcher_has_ended(self) -> None:
        """Asks to stop because the launcher has ended. May be called from any thread."""
        self.asked, self.launcher_lost = self.asked or "the launcher has ended", True

    def requests(self) -> tuple[float, float, float]:
        """Returns the requests of this rank, which are summed over all ranks: 1 if it asks to stop; 1 if its launcher has
        ended; and the number in the stop file. What does not apply is 0."""
        if self.is_orphan():
            self.launcher_has_ended()
        return float(bool(self.asked)), float(self.launcher_lost), self._read()

    def decide(self, step: int, shared: Shared) -> tuple[bool, bool]:
        """Decides what to do after ``step``. Returns (whether to stop, whether to save).

        Args:
            shared: the sums over all ranks.
        """
        at = int(shared.stop_at)
        stop = shared.stop_asked > 0 or 0 < at <= step
        self.cut_off = shared.launcher_ended > 0
        if stop and self.asked:
            log.info(f"{self.asked}: the run stops after step {step}")
        return stop, stop or (at < 0 and -at == step)

    def _read(self) -> float:
        try:
            return float(int(self.file.read_text().strip() or 0)) if self.file else 0.0
        except (OSError, ValueError, OverflowError):
            return 0.0  # it is missing, incomplete or not a number; the next step reads it again


def _leave_terminal() -> None:
    """If the terminal has been closed, lets later output go nowhere, since it would raise an error."""
    for file in (1, 2):
        if stat.S_ISCHR(os.fstat(file).st_mode) and not os.isatty(file):
            os.dup2(os.open(os.devnull, os.O_WRONLY), file)


class StopTime:
    """Measures how long a run needs to stop: the rest of a step, and a save. Whoever ends a run must give it this time."""

    def __init__(self, under_torchrun: bool) -> None:
        self.may_be_killed = under_torchrun
        """Whether torchrun may kill the run before it has stopped, and this has not been said yet."""
        self.steps, self.slowest = 0, 0.0
        """Number of steps, and seconds of the slowest one, without the first, which also compiles and connects."""

    def lines(self, record: StepRecord, save: float | None, stop: bool) -> list[str]:
        """Returns what to print after a step.

        Args:
            save: seconds that the last save took, if there was one.
            stop: whether the run stops after this step.
        """
        self.steps += 1
        self.slowest = record.step_time if self.steps <= 2 else max(self.slowest, record.step_time)
        if stop:
            return [f"the run was asked to stop and ends after step {record.step}; this takes {self._needed(save)}"]
        if self.may_be_killed and save is not None and self.slowest + save > TORCHRUN_PATIENCE:
            self.may_be_killed = False
            return [
                f"to stop, this run needs {self._needed(save)}. torchrun kills it after {TORCHRUN_PATIENCE:.0f} s, unless "
                "--shutdown-timeout says more"
            ]
        return []

    def _needed(self, save: float | None) -> str:
        step = f"up to {self.slowest:.1f} s for a step"
        if save is None:
            return f"{step}, and the time of a save, which has not been measured yet"
        return f"about {self.slowest + save:.1f} s: {step}, and {save:.1f} s for a save"
