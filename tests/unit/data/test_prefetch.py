"""Items made ahead by a thread, which must not outlive its use, nor hold up the end of a run."""

import signal
import threading
from collections.abc import Generator

import pytest

from internevo.data import prefetch
from internevo.data.prefetch import Prefetcher


def test_items_come_in_order_and_an_error_comes_after_them() -> None:
    def make() -> Generator[int, None, None]:
        yield from range(3)
        raise ValueError("no more")

    items = Prefetcher(make(), 2, "test")
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):  # whoever asks again gets it again
        with pytest.raises(ValueError, match="no more"):
            next(items)
    items.close()


def test_closing_ends_the_generator_in_its_thread() -> None:
    closed_in: list[str] = []

    def make() -> Generator[int, None, None]:
        try:
            while True:
                yield 0
        finally:
            closed_in.append(threading.current_thread().name)

    items = Prefetcher(make(), 1, "test")
    next(items)
    items.close()
    assert closed_in == ["test"]


def test_closing_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator may wait for other ranks, which wait for this one."""
    monkeypatch.setattr(prefetch, "CLOSE_TIMEOUT", 0.05)
    begun, other = threading.Event(), threading.Event()

    def make() -> Generator[int, None, None]:
        begun.set()
        other.wait()
        yield 0

    items = Prefetcher(make(), 1, "test")
    begun.wait()
    items.close()
    other.set()


def test_what_the_thread_starts_does_not_hear_of_requests_to_stop() -> None:
    def make() -> Generator[set[int], None, None]:
        yield signal.pthread_sigmask(signal.SIG_BLOCK, ())

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    items = Prefetcher(make(), 1, "test")
    assert {signal.SIGINT, signal.SIGUSR1} <= next(items)
    items.close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
