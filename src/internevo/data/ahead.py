"""Items made ahead by a thread."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
PATIENCE = 90.0
"""Seconds that a thread has to stop: more than the exchange of a stream waits for ranks that do not answer."""


class _End:
    pass


class Ahead(Generic[T], Iterator[T]):
    """Iterates over a generator that runs in a thread, ``depth`` items ahead; an error there is raised here."""

    def __init__(self, items: Generator[T, None, None], depth: int, name: str) -> None:
        self._made: queue.Queue[T | BaseException | _End] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(items,), name=name, daemon=True)
        self._thread.start()

    def _work(self, items: Generator[T, None, None]) -> None:
        # What asks a run to stop may be sent to all of its processes: those that this thread starts must not die of it.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGUSR1))
        try:
            for item in items:
                self._put(item)
                if self._stopped.is_set():
                    break
            items.close()  # in this thread: what it cleans up is this thread's
            self._put(_End())
        except BaseException as error:
            self._put(error)

    def _put(self, item: T | BaseException | _End) -> None:
        while not self._stopped.is_set():
            try:
                self._made.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def __next__(self) -> T:
        item = self._made.get()
        if isinstance(item, (BaseException, _End)):
            self._made.put(item)  # for whoever asks again
            if isinstance(item, BaseException):
                raise item
            raise StopIteration
        return item

    def close(self) -> None:
        """Stops the thread and waits for it; what was made is dropped. A thread that waits for other ranks, when this one has
        failed and they wait for it, is left alone after a while: it ends with the process."""
        self._stopped.set()
        self._thread.join(PATIENCE)
