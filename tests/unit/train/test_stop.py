"""Requests to stop or to save: by file, by signal, and what all ranks make of them."""

import os
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internevo.train.shared import Shared
from internevo.train.stop import SIGNALS, StopRequests


def shared(asked: float = 0.0, at: float = 0.0) -> Shared:
    return Shared(stop_asked=asked, stop_at=at, data_skipped=0.0, memory_peak=[])


@pytest.fixture
def watched(tmp_path: Path) -> StopRequests:
    """Requests of rank 0, which reads a file, in a folder that is not there yet."""
    stops = StopRequests()
    stops.watch(str(tmp_path / "new" / "stop"))
    return stops


def file_of(stops: StopRequests) -> Path:
    assert stops.file is not None
    return stops.file


def test_a_watched_file_begins_as_0_whatever_was_in_it(watched: StopRequests) -> None:
    file_of(watched).write_text("7")
    watched.watch(str(file_of(watched)))
    assert file_of(watched).read_text() == "0"
    assert watched.requests() == (0.0, 0.0)


@pytest.mark.parametrize(
    ("content", "number"),
    [(b"0", 0), (b"12", 12), (b"12\n", 12), (b" 12 ", 12), (b"-12", -12), (b"-12\r\n", -12)],
)
def test_the_files_number_is_shared(watched: StopRequests, content: bytes, number: int) -> None:
    file_of(watched).write_bytes(content)
    assert watched.requests() == (0.0, float(number))


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"stop", b"1.5", b"-", b"3 4", b"\xff\xfe", b"\x00" * 8, b"9" * 400, b"9" * 5000]
)
def test_a_damaged_file_asks_for_nothing(watched: StopRequests, content: bytes) -> None:
    file_of(watched).write_bytes(content)
    assert watched.requests() == (0.0, 0.0)


def test_a_file_that_is_gone_or_a_folder_asks_for_nothing_until_it_is_back(watched: StopRequests) -> None:
    path = file_of(watched)
    path.unlink()
    assert watched.requests() == (0.0, 0.0)
    path.mkdir()
    assert watched.requests() == (0.0, 0.0)
    path.rmdir()
    path.write_text("3")
    assert watched.requests() == (0.0, 3.0)


def test_ranks_without_a_file_ask_for_nothing() -> None:
    assert StopRequests().requests() == (0.0, 0.0)


@given(step=st.integers(1, 1000), at=st.integers(-1000, 1000), ranks=st.lists(st.booleans(), min_size=1, max_size=5))
def test_all_ranks_decide_from_the_sums(step: int, at: int, ranks: list[bool]) -> None:
    """N: stop and save at step N, or at once where it is past. -N: save at step N. A signal on any rank: stop and save."""
    decided = {StopRequests().decide(step, shared(float(sum(ranks)), float(at))) for _ in ranks}
    stop = any(ranks) or (at > 0 and step >= at)
    assert decided == {(stop, stop or step == -at)}


def test_a_step_that_is_passed_stops_and_a_save_that_is_passed_does_not_come_again() -> None:
    decide = StopRequests().decide
    assert [decide(step, shared(at=3.0)) for step in (2, 3, 4)] == [(False, False), (True, True), (True, True)]
    assert [decide(step, shared(at=-3.0)) for step in (2, 3, 4)] == [(False, False), (False, True), (False, False)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_becomes_a_request_and_its_handler_comes_back(number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    stops = StopRequests()
    with stops.listening():
        assert stops.requests() == (0.0, 0.0)
        os.kill(os.getpid(), number)
        assert stops.requests() == (1.0, 0.0)
    assert {n: signal.getsignal(n) for n in before} == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_from_before_listening_is_a_request_and_one_from_after_it_is_nothing(number: signal.Signals) -> None:
    """In a process that was started with the signals blocked, as the launcher does."""
    handlers = {n: signal.getsignal(n) for n in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        signal.pthread_kill(threading.get_ident(), number)  # not to another thread, which does not block it
        stops = StopRequests()
        with stops.listening():
            assert stops.requests() == (1.0, 0.0)
        os.kill(os.getpid(), number)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask | set(SIGNALS)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for n, handler in handlers.items():
            signal.signal(n, handler)


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    stops = StopRequests()
    with pytest.raises(KeyboardInterrupt), stops.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert stops.asked
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before
