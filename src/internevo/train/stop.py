"""Requests to stop or to save: SIGTERM, SIGUSR1 and Ctrl-C on any rank, and InternEvo's stop file."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..observe.console import log
from .shared import Shared


class StopRequests:
    """Collects requests on this rank; all ranks learn of them with the losses of a step, and decide alike."""

    def __init__(self) -> None:
        self.asked = False
        self.file: Path | None = None

    def watch(self, file: str) -> None:
        """Rank 0 also reads a file at each step. It begins as "0"; "N" means save and stop at step N, "-N" save and go on."""
        self.file = Path(file)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("0")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turns the signals into requests. A second Ctrl-C interrupts at once."""

        def ask(number: int, _frame: object) -> None:
            log.info(f"{signal.Signals(number).name}: this step is finished and saved, then the run stops")
            self.asked = True
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)

        old = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def requests(self) -> tuple[float, float]:
        """This rank's: 1 when it was asked by a signal, and the number in the stop file; to be summed over all ranks."""
        return float(self.asked), self._read()

    def decide(self, step: int, shared: Shared) -> tuple[bool, bool]:
        """(stop, save) after ``step``, from the sums over all ranks."""
        at = int(shared.stop_at)
        stop = shared.stop_asked > 0 or 0 < at <= step
        return stop, stop or (at < 0 and -at == step)

    def _read(self) -> float:
        try:
            return float(int(self.file.read_text().strip() or 0)) if self.file else 0.0
        except (OSError, ValueError, OverflowError):
            return 0.0  # half-written, gone or nonsense: the next step looks again
