"""Requests to stop or to save, by file and by signal, and the decision of all ranks."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internevo.observe.record import StepRecord
from internevo.parallel.launcher import STOP_SIGNALS
from internevo.train.shared import Shared
from internevo.train.stop import StopRequests, StopTime


def shared(asked: float = 0.0, at: float = 0.0, lost: float = 0.0) -> Shared:
    return Shared(stop_asked=asked, launcher_ended=lost, stop_at=at, data_skipped=0.0, memory_peak=[])


@pytest.fixture
def watched(tmp_path: Path) -> StopRequests:
    """The requests of rank 0, which reads a stop file in a folder that did not exist before."""
    stops = StopRequests()
    stops.watch(str(tmp_path / "new" / "stop"))
    return stops


def file_of(stops: StopRequests) -> Path:
    assert stops.file is not None
    return stops.file


def test_0_is_written_to_the_stop_file_at_the_start(watched: StopRequests) -> None:
    file_of(watched).write_text("7")
    watched.watch(str(file_of(watched)))
    assert file_of(watched).read_text() == "0"
    assert watched.requests() == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("content", "number"),
    [(b"0", 0), (b"12", 12), (b"12\n", 12), (b" 12 ", 12), (b"-12", -12), (b"-12\r\n", -12)],
)
def test_the_number_in_the_stop_file_is_shared(watched: StopRequests, content: bytes, number: int) -> None:
    file_of(watched).write_bytes(content)
    assert watched.requests() == (0.0, 0.0, float(number))


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"stop", b"1.5", b"-", b"3 4", b"\xff\xfe", b"\x00" * 8, b"9" * 400, b"9" * 5000]
)
def test_a_damaged_stop_file_requests_nothing(watched: StopRequests, content: bytes) -> None:
    file_of(watched).write_bytes(content)
    assert watched.requests() == (0.0, 0.0, 0.0)


def test_a_missing_stop_file_requests_nothing_until_it_exists_again(watched: StopRequests) -> None:
    path = file_of(watched)
    path.unlink()
    assert watched.requests() == (0.0, 0.0, 0.0)
    path.mkdir()
    assert watched.requests() == (0.0, 0.0, 0.0)
    path.rmdir()
    path.write_text("3")
    assert watched.requests() == (0.0, 0.0, 3.0)


def test_ranks_without_a_stop_file_request_nothing() -> None:
    assert StopRequests().requests() == (0.0, 0.0, 0.0)


@given(step=st.integers(1, 1000), at=st.integers(-1000, 1000), ranks=st.lists(st.booleans(), min_size=1, max_size=5))
def test_all_ranks_decide_from_the_sums(step: int, at: int, ranks: list[bool]) -> None:
    """N: stop and save at step N, or now if N has passed. -N: save at step N. A signal on any rank: stop and save."""
    decided = {StopRequests().decide(step, shared(float(sum(ranks)), float(at))) for _ in ranks}
    stop = any(ranks) or (at > 0 and step >= at)
    assert decided == {(stop, stop or step == -at)}


def test_a_stop_in_the_past_still_stops_and_a_save_in_the_past_is_not_repeated() -> None:
    decide = StopRequests().decide
    assert [decide(step, shared(at=3.0)) for step in (2, 3, 4)] == [(False, False), (True, True), (True, True)]
    assert [decide(step, shared(at=-3.0)) for step in (2, 3, 4)] == [(False, False), (False, True), (False, False)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_becomes_a_request_and_the_old_handlers_are_restored(number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    stops = StopRequests()
    with stops.listening():
        assert stops.requests() == (0.0, 0.0, 0.0)
        os.kill(os.getpid(), number)
        assert stops.requests() == (1.0, 0.0, 0.0)
    assert {n: signal.getsignal(n) for n in before} == before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_before_listening_becomes_a_request_and_one_after_it_is_ignored(number: signal.Signals) -> None:
    """In a process that was started with the signals blocked, as the launcher does."""
    handlers = {n: signal.getsignal(n) for n in STOP_SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        signal.pthread_kill(threading.get_ident(), number)  # to this thread: others do not block it
        stops = StopRequests()
        with stops.listening():
            assert stops.requests() == (1.0, 0.0, 0.0)
        os.kill(os.getpid(), number)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask | set(STOP_SIGNALS)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for n, handler in handlers.items():
            signal.signal(n, handler)


def test_a_second_ctrl_c_interrupts_immediately() -> None:
    before = signal.getsignal(signal.SIGINT)
    stops = StopRequests()
    with pytest.raises(KeyboardInterrupt), stops.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert stops.asked
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_under_nohup_a_process_ignores_sighup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stops = StopRequests()
        with stops.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            assert stops.requests() == (0.0, 0.0, 0.0)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_stops_when_its_launcher_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    stops, alone = StopRequests(os.getppid()), StopRequests()
    assert stops.requests() == alone.requests() == (0.0, 0.0, 0.0)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stops.requests() == (1.0, 1.0, 0.0)
    assert stops.asked == "the launcher has ended"
    assert alone.requests() == (0.0, 0.0, 0.0)


def test_every_rank_knows_that_the_run_stops_because_a_launcher_has_ended() -> None:
    for lost in (0.0, 1.0):
        stops = StopRequests()
        assert stops.decide(2, shared(asked=1.0, lost=lost)) == (True, True)
        assert stops.cut_off == (lost > 0)


def test_init_may_be_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose first process is torchrun."""
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert StopRequests(1).requests() == (0.0, 0.0, 0.0)


CLOSED_TERMINAL = """
import os, signal, sys
from internevo.train.stop import StopRequests
stops = StopRequests()
with stops.listening():
    print("ready", flush=True)
    sys.stdin.read()
    try:
        os.write(1, b"x")
        sys.exit("the terminal is open")
    except OSError:
        pass
    os.kill(os.getpid(), signal.SIGHUP)
    print(stops.asked, flush=True)
"""


def test_after_the_terminal_is_closed_a_run_can_still_print() -> None:
    """The last lines of a run come after the signal."""
    terminal, end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CLOSED_TERMINAL], stdin=subprocess.PIPE, stdout=end, stderr=subprocess.PIPE
    )
    os.close(end)
    line = b""
    while not line.endswith(b"\n"):  # a terminal that is closed while the line is being written fails too soon
        line += os.read(terminal, 16)
    assert line.strip() == b"ready"
    os.close(terminal)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def record(step: int, seconds: float) -> StepRecord:
    return StepRecord(
        step=step, loss=1.0, grad_norm=1.0, lr=1.0, tokens=1, consumed_tokens=1, tgs=1.0, tflops=1.0, mfu=None,
        step_time=seconds, data_time=0.0, memory_peak=1, memory_peak_max=1, skipped=False, time=0.0, loss_by_type={},
        loss_scale=None, skipped_steps=0, moe=None, data_skipped=0,
    )  # fmt: skip


def test_a_run_that_is_asked_to_stop_says_how_long_it_needs() -> None:
    """As long as the slowest step and a save. The first step also compiles."""
    time = StopTime(under_torchrun=False)
    for step, seconds in ((1, 100.0), (2, 20.0), (3, 10.0)):
        assert time.lines(record(step, seconds), save=60.0, stop=False) == []
    (line,) = time.lines(record(4, 10.0), save=60.0, stop=True)
    assert "ends after step 4" in line and "about 80.0 s: up to 20.0 s for a step, and 60.0 s for a save" in line
    (line,) = time.lines(record(4, 10.0), save=None, stop=True)
    assert "up to 20.0 s for a step, and the time of a save, which has not been measured yet" in line


def test_under_torchrun_a_run_that_needs_longer_than_torchrun_waits_says_so_once() -> None:
    time = StopTime(under_torchrun=True)
    assert time.lines(record(1, 1.0), save=None, stop=False) == []
    assert time.lines(record(2, 1.0), save=28.0, stop=False) == []
    (line,) = time.lines(record(3, 3.0), save=28.0, stop=False)
    assert "about 31.0 s" in line and "--shutdown-timeout" in line
    assert time.lines(record(4, 3.0), save=28.0, stop=False) == []


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_the_first_signal_is_told_from_another_thread() -> None:
    """So nobody waits for the main thread, which may compute for long before Python calls its handler."""
    stops, told, threads = StopRequests(), threading.Event(), list[tuple[str, int]]()

    def tell(name: str) -> None:
        threads.append((name, threading.get_ident()))
        told.set()

    stops.on_signal = tell
    with stops.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert told.wait(60)
        for _ in range(20):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.001)
    ((name, thread),) = threads
    assert name == "SIGUSR1" and thread != threading.get_ident() and stops.asked == "SIGTERM"
