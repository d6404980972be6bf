"""Ends a run that hangs, and reports which rank is the cause.

Ranks wait for each other in collectives. If one rank hangs or has ended, all others wait, and none knows for which rank. So
each rank has a watchdog thread, which works while the main thread waits:

1. A rank whose step takes too long, or which has failed, raises an alarm in the store of the run.
2. The watchdogs check regularly for an alarm. Each then writes where its rank is: the line that its main thread is executing.
3. One rank collects these answers and writes a report. Every rank prints the report and ends.

A rank without an answer has ended, or hangs in a way that no thread can run.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from ..errors import InternEvoError
from ..observe.console import log
from ..parallel.world import World, is_lost_rank

SLACK = 5
"""A step may always take this many times as long per token as the slowest step before it."""
LONG_WAIT, SHORT_WAIT = 600.0, 30.0
"""Seconds that ``before_end`` may take, and the same if a rank has been lost."""
NO_ANSWER = "no answer: the process has ended, or it hangs and no thread can run"
PACKAGE = Path(__file__).parents[1]


class Watchdog:
    """The watchdog of a rank. It is a context for all that the rank does in a run; ``step`` is the context of a step."""

    def __init__(self, world: World, limit: float, interval: float = 5.0) -> None:
        """
        Args:
            limit: seconds that a step except the first may take (``monitor.timeout``); 0: no limit.
            interval: seconds between two checks for an alarm.
        """
        self.world, self.limit, self.interval = world, limit, interval
        self.before_end: Callable[[float], None] = lambda patience: None
        """Is called before this rank ends because the run has failed, with the seconds that it may take."""
        self.on_lost_store: Callable[[], None] | None = None
        """Is called when the process with the store has ended, if that is the launcher. The ranks then finish their step."""
        self.started = 0
        """Number of steps started."""
        self.steps = 0
        """Number of steps finished."""
        self.pace = 0.0
        """Seconds per token of the slowest step, without the first, which also compiles and connects."""
        self.allowed: float | None = None
        """Seconds that the current step may take; None between steps."""
        self.main = threading.get_ident()
        """The main thread."""
        self.failure = ""
        """This rank's answer after it has failed."""
        self.over, self.ending = threading.Event(), threading.Lock()
        self.roll: RollCall | None = None
        self.thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self.world.size > 1:
            self.roll = RollCall(self.world.store.clone(), self.world.rank, self.world.size, self.interval)  # type: ignore[attr-defined]
            self.thread = threading.Thread(target=self._watch, args=(self.roll,), name="watchdog", daemon=True)
            self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and self.roll is not None and is_lost_rank(error):
            self._raise_report(error, self.roll)
        if error is not None:
            self.failure = _explain(error) if isinstance(error, Exception) else "was interrupted"
        with self.ending:
            self.over.set()
        if self.roll is not None:
            self.roll.leave(self.failure)  # at once, so that the other ranks do not wait for this one
        if isinstance(error, Exception):
            self.before_end(LONG_WAIT)
        if self.thread is not None:
            self.thread.join()  # Python would crash if it ended while the thread is in a call of the store

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """The context of a step. ``tokens``: number of tokens of its global batch."""
        begin = time.monotonic()
        self.started += 1
        self.allowed = max(self.limit, SLACK * tokens * self.pace) if self.limit and self.steps else float("inf")
        try:
            yield
        except Exception as error:
            self.failure = _explain(error)  # now, since the watchdog thread may need it before the error is handled
            raise
        finally:
            self.allowed = None
        self.steps += 1
        pace = (time.monotonic() - begin) / tokens
        self.pace = pace if self.steps <= 2 else max(self.pace, pace)

    def _watch(self, roll: RollCall) -> None:
        """Runs in the watchdog thread."""
        step, waited, unanswered = -1, 0.0, 0
        while not self.over.wait(self.interval):
            allowed = self.allowed
            # Time is counted in intervals and not by the clock, so that a job may be suspended. The time between steps
            # (evaluation, samples, checkpoints) does not count.
            waited = waited + self.interval if allowed is not None and step == self.started else 0.0
            step = self.started
            too_long = allowed is not None and waited > allowed
            try:
                if too_long:
                    roll.alarm(f"a step has taken more than {allowed:.0f} s (monitor.timeout) on rank {self.world.rank}")
                alarmed, unanswered = roll.alarmed(), 0
            except RuntimeError:
                # The process with the store, rank 0 or the launcher, has ended: normally, or too early.
                unanswered += 1
                alarmed = unanswered >= 3 and allowed is not None
                if unanswered >= 3 and self.on_lost_store is not None:
                    self.on_lost_store()
                    alarmed = too_long
            if alarmed:
                self._end(roll)

    def _end(self, roll: RollCall) -> None:
        """Reports and ends the process, from the watchdog thread."""
        with self.ending:
            if self.over.is_set():
                return  # the run is over, or the main thread ends the process
            try:
                report = roll.report(self.failure or f"at {_line(self._main_stack())}")
                with suppress(Exception):  # standard error may not be a real file
                    faulthandler.dump_traceback(all_threads=True)
                log.error(report)
                print(f"error: {report}", file=sys.stderr, flush=True)
                self.before_end(SHORT_WAIT if roll.lost_a_rank else LONG_WAIT)
            finally:
                os._exit(1)  # even if this has failed: the main thread may wait forever

    def _raise_report(self, error: BaseException, roll: RollCall) -> None:
        """Raises the report of all ranks, instead of the error of a collective that failed because of another rank."""
        with self.ending:
            self.over.set()
        roll.alarm(f"rank {self.world.rank} has lost another rank in a collective")
        report = roll.report(_explain(error))
        self.before_end(SHORT_WAIT if roll.lost_a_rank else LONG_WAIT)
        raise InternEvoError(report) from error

    def _main_stack(self) -> traceback.StackSummary:
        return traceback.extract_stack(sys._current_frames().get(self.main))


class RollCall:
    """Asks all ranks where they are, and collects their answers, through the store of the run."""

    def __init__(self, store: dist.Store, rank: int, size: int, interval: float) -> None:
        """``interval``: seconds between two checks of a rank for an alarm."""
        self.store, self.rank, self.size = dist.PrefixStore("watchdog", store), rank, size
        self.patience = 3 * interval
        self.lost_a_rank = False
        """Whether a rank did not answer in the last report, or the process with the store has ended."""
        self.store.set_timeout(timedelta(seconds=3 * self.patience))

    def alarm(self, reason: str) -> None:
        """Raises an alarm: all ranks are asked where they are. Only the first reason is kept."""
        self.store.compare_set("alarm", "", reason)

    def alarmed(self) -> bool:
        """Whether a rank has raised an alarm."""
        return self.store.check(["alarm"])

    def leave(self, failure: str) -> None:
        """Must be called when this rank ends. A ``failure`` that is not empty raises an alarm for the other ranks."""
        with suppress(RuntimeError):  # the process with the store may have ended before
            self._answer(failure or "has finished")
            if failure:
                self.alarm(f"rank {self.rank} has failed")
                self._release_store()

    def report(self, answer: str) -> str:
        """Answers an alarm. Returns the answers of all ranks."""
        try:
            self._answer(answer)
            writer = str(self.rank).encode()
            if self.store.compare_set("writer", "", writer.decode()) == writer:
                self.store.set("report", self._collect())
            report = self.store.get("report").decode()
            self.lost_a_rank = NO_ANSWER in report
            self._release_store()
            return report
        except RuntimeError as error:
            self.lost_a_rank = True
            return f"{answer}; the other ranks cannot be asked, because the store of the run does not answer: {error}"

    def _answer(self, text: str) -> None:
        self.store.set(f"rank {self.rank}", text)

    def _release_store(self) -> None:
        """Says that this rank does not need the store any more. Rank 0, which may have the store, waits for the other ranks."""
        self.store.add("released", 1)
        end = time.monotonic() + self.patience
        while self.rank == 0 and time.monotonic() < end:
            answered = int(self.store.get("answered")) if self.store.check(["answered"]) else self.size
            if self.store.add("released", 0) >= answered:
                return
            time.sleep(0.1)

    def _collect(self) -> str:
        answers: dict[int, str] = {}
        end = time.monotonic() + self.patience
        while len(answers) < self.size and time.monotonic() < end:
            for rank in set(range(self.size)) - set(answers):
                if self.store.check([f"rank {rank}"]):
                    answers[rank] = self.store.get(f"rank {rank}").decode()
            time.sleep(0.1)
        self.store.set("answered", str(len(answers)))
        by_answer: dict[str, list[int]] = defaultdict(list)
        for rank in range(self.size):
            by_answer[answers.get(rank, NO_ANSWER)].append(rank)
        # First the ranks without an answer, and then the answers of few ranks: they are most likely the cause.
        found = sorted(by_answer.items(), key=lambda pair: (pair[0] != NO_ANSWER, len(pair[1])))
        lines = [f"rank{'s' if len(ranks) > 1 else ''} {_spans(ranks)}: {text}" for text, ranks in found]
        return "\n  ".join([f"the run cannot continue: {self.store.get('alarm').decode()}", *lines])


def _explain(error: BaseException) -> str:
    """Returns the answer of a rank that has failed."""
    if not is_lost_rank(error):
        return f"has failed: {type(error).__name__}: {error}"
    return f"stopped at {_line(traceback.extract_tb(error.__traceback__))}: {str(error).splitlines()[0]}"


def _line(stack: Sequence[traceback.FrameSummary]) -> str:
    """Returns the innermost line of this package in a stack."""
    frames = [frame for frame in stack if Path(frame.filename).is_relative_to(PACKAGE)]
    if not frames:
        return "a line outside this program"
    return f"{Path(frames[-1].filename).relative_to(PACKAGE)}:{frames[-1].lineno} in {frames[-1].name}"


def _spans(numbers: list[int]) -> str:
    """Formats numbers: [0, 1, 2, 5] -> "0-2, 5"."""
    firsts = [n for n in numbers if n - 1 not in numbers]
    lasts = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))
