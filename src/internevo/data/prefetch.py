"""Runs a generator in a thread, so that its next items are ready when they are needed."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
CLOSE_TIMEOUT = 90.0
"""How long ``close`` waits for the thread, in seconds. The thread may itself wait for ranks that do not answer, for up to
``streaming.exchange.LEAVE_TIMEOUT``."""


class _End:
    """Put into the queue after the last item."""


class Prefetcher(Generic[T], Iterator[T]):
    """Iterates over a generator that runs in a thread, up to ``depth`` items ahead. Its errors are raised in ``__next__``."""

    def __init__(self, items: Generator[T, None, None], depth: int, name: str) -> None:
        """Starts the thread, which is called ``name``."""
        self._queue: queue.Queue[T | BaseException | _End] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), name=name, daemon=True)
        self._thread.start()

    def _run(self, items: Generator[T, None, None]) -> None:
        # A signal that stops a run may be sent to all of its processes. Worker processes that this thread starts inherit its
        # signal mask, and must not be ended by the signal.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP))
        try:
            for item in items:
                self._put(item)
                if self._stopped.is_set():
                    break
            items.close()  # in this thread, because what the generator cleans up belongs to this thread
            self._put(_End())
        except BaseException as error:
            self._put(error)

    def _put(self, item: T | BaseException | _End) -> None:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def __next__(self) -> T:
        item = self._queue.get()
        if isinstance(item, (BaseException, _End)):
            self._queue.put(item)  # for the next call
            if isinstance(item, BaseException):
                raise item
            raise StopIteration
        return item

    def close(self) -> None:
        """Stops the thread and waits for it. Items that were not used are dropped.

        After ``CLOSE_TIMEOUT`` the thread is left running, and ends with the process: it may wait for other ranks, which wait
        for this one, if this one has failed.
        """
        self._stopped.set()
        self._thread.join(CLOSE_TIMEOUT)
