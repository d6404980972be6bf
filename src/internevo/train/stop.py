"""Requests to stop or to save: SIGTERM, SIGUSR1 and Ctrl-C on any rank, and InternEvo's stop file."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UsageError
from ..observe.console import log
from ..storage.naming import naming
from .shared import Shared

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""These signals and Ctrl-C ask a run to stop."""


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

    def __init__(self) -> None:
        self.asked = ""
        """Name of the signal that this rank has received; empty if none."""
        self.file: Path | None = None

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
        """A context in which signals become requests. A second Ctrl-C interrupts the process immediately.

        The launcher starts processes with SIGTERM and SIGUSR1 blocked. A signal that comes before this context is delivered
        when the context begins. After the context, such a process ignores them. Thus a request to stop kills no process.
        """

        def ask(number: int, _frame: object) -> None:
            # Nothing more may be done here: the main thread may be anywhere, even in the middle of writing to the log.
            self.asked = signal.Signals(number).name
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)

        old = {number: signal.signal(number, ask) for number in (*SIGNALS, signal.SIGINT)}
        blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, signal.SIG_IGN if number in blocked else handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def requests(self) -> tuple[float, float]:
        """Returns the requests of this rank, which are summed over all ranks: 1 after a signal, otherwise 0; and the number in
        the stop file."""
        return float(bool(self.asked)), self._read()

    def decide(self, step: int, shared: Shared) -> tuple[bool, bool]:
        """Decides what to do after ``step``. Returns (whether to stop, whether to save).

        Args:
            shared: the sums over all ranks.
        """
        at = int(shared.stop_at)
        stop = shared.stop_asked > 0 or 0 < at <= step
        if stop and self.asked:
            log.info(f"{self.asked}: the run stops after step {step}")
        return stop, stop or (at < 0 and -at == step)

    def _read(self) -> float:
        try:
            return float(int(self.file.read_text().strip() or 0)) if self.file else 0.0
        except (OSError, ValueError, OverflowError):
            return 0.0  # it is missing, incomplete or not a number; the next step reads it again
