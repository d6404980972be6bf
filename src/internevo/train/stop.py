"""Requests to stop or to save: SIGTERM, SIGUSR1 and Ctrl-C on any rank, and InternEvo's stop file."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..observe.console import log
from .shared import Shared

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""With Ctrl-C, what asks a run to stop."""


class StopRequests:
    """Collects requests on this rank; all ranks learn of them with the losses of a step, and decide alike."""

    def __init__(self) -> None:
        self.asked = ""
        """Name of the signal that has come."""
        self.file: Path | None = None

    def watch(self, file: str) -> None:
        """Rank 0 also reads a file at each step. It begins as "0"; "N" means save and stop at step N, "-N" save and go on."""
        self.file = Path(file)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("0")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turns the signals into requests. A second Ctrl-C interrupts at once.

        The launcher starts its processes with SIGTERM and SIGUSR1 blocked: one that comes before they listen waits until they
        do. When the run is over, such a process ignores them. So none is killed by what asks all of them to stop.
        """

        def ask(number: int, _frame: object) -> None:
            # Nothing else here: the main thread may be anywhere, also in the middle of a line of the log.
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
        """This rank's: 1 when it was asked by a signal, and the number in the stop file; to be summed over all ranks."""
        return float(bool(self.asked)), self._read()

    def decide(self, step: int, shared: Shared) -> tuple[bool, bool]:
        """(stop, save) after ``step``, from the sums over all ranks."""
        at = int(shared.stop_at)
        stop = shared.stop_asked > 0 or 0 < at <= step
        if stop and self.asked:
            log.info(f"{self.asked}: the run stops after step {step}")
        return stop, stop or (at < 0 and -at == step)

    def _read(self) -> float:
        try:
            return float(int(self.file.read_text().strip() or 0)) if self.file else 0.0
        except (OSError, ValueError, OverflowError):
            return 0.0  # half-written, gone or nonsense: the next step looks again
