"""Ends a run that does not go on, and says which rank holds it up.

Ranks wait for each other in collectives: when one hangs or is gone, all others wait, and none of them knows for whom. So each
has a thread that answers for it, whatever the rank itself is doing:

1. A rank whose step takes too long, or which has failed, raises the alarm in the run's store.
2. The threads look for an alarm now and then. Each answers where its rank is: the line that its main thread has come to.
3. One rank collects the answers and writes the report. Each gives it as its last message and ends.

A rank without an answer is gone, or hangs where not even a thread can run.
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
from ..parallel.world import World, lost_another

SLACK = 5
"""A step may always take this many times as long as the slowest before it, token by token."""
LONG, SHORT = 600.0, 30.0
"""Seconds for what must be done before the end, and when a rank is gone."""
SILENT = "no answer: it is gone, or hangs where no thread can run"
PACKAGE = Path(__file__).parents[1]


class Watchdog:
    """``with Watchdog(...)`` around all that a rank does in a run, ``with watchdog.step(...)`` around each step."""

    def __init__(self, world: World, limit: float, interval: float = 5.0) -> None:
        """
        Args:
            limit: seconds that a step may take, once the first is done; 0: as long as it likes.
            interval: seconds from one look for an alarm to the next.
        """
        self.world, self.limit, self.interval = world, limit, interval
        self.before_end: Callable[[float], None] = lambda patience: None
        """What must be done before a run that has failed ends on this rank; it is given the seconds that it may take."""
        self.started, self.steps, self.pace = 0, 0, 0.0
        """Steps started; steps done; seconds per token of the slowest, without the first, which also compiles and connects."""
        self.allowed: float | None = None
        """Seconds that the step under way may take; None between steps."""
        self.main, self.failure = threading.get_ident(), ""
        """The thread to answer for; and what it answers once the run has failed here."""
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
        if error is not None and self.roll is not None and lost_another(error):
            self._lost_another(error, self.roll)
        if isinstance(error, Exception):
            self.failure = _explain(error)  # the thread goes on meanwhile
            self.before_end(LONG)
        elif error is not None:
            self.failure = "was interrupted"
        with self.ending:
            self.over.set()
        if self.roll is not None and self.thread is not None:
            self.roll.leave(self.failure)
            self.thread.join()  # the end of Python in a thread that asks the store would be a crash

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Around a step that trains on this many tokens."""
        begin = time.monotonic()
        self.started += 1
        self.allowed = max(self.limit, SLACK * tokens * self.pace) if self.limit and self.steps else float("inf")
        try:
            yield
        except Exception as error:
            self.failure = _explain(error)  # before anything else is done about it
            raise
        finally:
            self.allowed = None
        self.steps += 1
        pace = (time.monotonic() - begin) / tokens
        self.pace = pace if self.steps <= 2 else max(self.pace, pace)

    def _watch(self, roll: RollCall) -> None:
        """The thread."""
        step, waited, unanswered = -1, 0.0, 0
        while not self.over.wait(self.interval):
            allowed = self.allowed
            # Time is counted in intervals, not by the clock: no rank is late while the whole job is suspended. What comes
            # between steps (evaluation, samples, checkpoints) does not count.
            waited = waited + self.interval if allowed is not None and step == self.started else 0.0
            step = self.started
            try:
                if allowed is not None and waited > allowed:
                    roll.alarm(f"a step has taken more than {allowed:.0f} s (monitor.timeout) on rank {self.world.rank}")
                alarmed, unanswered = roll.alarmed(), 0
            except RuntimeError:
                # The store is gone with the rank or the launcher that has it: at the end of a run, or in its middle.
                unanswered += 1
                alarmed = unanswered >= 3 and allowed is not None
            if alarmed:
                self._end(roll)

    def _end(self, roll: RollCall) -> None:
        """Ends the process from the thread."""
        with self.ending:
            if self.over.is_set():
                return  # the main thread ends it, or all is well
            try:
                report = roll.report(self.failure or f"at {_line(self._main_stack())}")
                with suppress(Exception):  # there may be no real standard error
                    faulthandler.dump_traceback(all_threads=True)
                log.error(report)
                print(f"error: {report}", file=sys.stderr, flush=True)
                self.before_end(SHORT if roll.lost_a_rank else LONG)
            finally:
                os._exit(1)  # also when this has failed: the main thread may wait for ever

    def _lost_another(self, error: BaseException, roll: RollCall) -> None:
        """Raises an error that says more than that of the collective."""
        with self.ending:
            self.over.set()
        roll.alarm(f"rank {self.world.rank} has lost another rank in a collective")
        report = roll.report(_explain(error))
        self.before_end(SHORT if roll.lost_a_rank else LONG)
        raise InternEvoError(report) from error

    def _main_stack(self) -> traceback.StackSummary:
        return traceback.extract_stack(sys._current_frames().get(self.main))


class RollCall:
    """How the ranks learn from each other where they are, through the run's store."""

    def __init__(self, store: dist.Store, rank: int, size: int, interval: float) -> None:
        """``interval``: the longest that a rank needs to see an alarm."""
        self.store, self.rank, self.size = dist.PrefixStore("watchdog", store), rank, size
        self.patience = 3 * interval
        self.lost_a_rank = False
        """Whether, by the last report, a rank is gone, or the store with the rank that had it."""
        self.store.set_timeout(timedelta(seconds=3 * self.patience))

    def alarm(self, reason: str) -> None:
        """Asks all ranks where they are. The first reason counts."""
        self.store.compare_set("alarm", "", reason)

    def alarmed(self) -> bool:
        """Whether somebody asks."""
        return self.store.check(["alarm"])

    def leave(self, failure: str) -> None:
        """This rank ends: well, or with a failure, which is an alarm for the others."""
        with suppress(RuntimeError):  # the rank that has the store may have left before
            self._answer(failure or "has finished")
            if failure:
                self.alarm(f"rank {self.rank} has failed")
                self._part()

    def report(self, answer: str) -> str:
        """This rank's answer to an alarm; returns what all have answered."""
        try:
            self._answer(answer)
            writer = str(self.rank).encode()
            if self.store.compare_set("writer", "", writer.decode()) == writer:
                self.store.set("report", self._collect())
            report = self.store.get("report").decode()
            self.lost_a_rank = SILENT in report
            self._part()
            return report
        except RuntimeError as error:
            self.lost_a_rank = True
            return f"{answer}; and the other ranks cannot be asked, since the run's store does not answer: {error}"

    def _answer(self, text: str) -> None:
        self.store.set(f"rank {self.rank}", text)

    def _part(self) -> None:
        """This rank needs the store no longer. Rank 0, which may have it, stays for those that do."""
        self.store.add("parted", 1)
        end = time.monotonic() + self.patience
        while self.rank == 0 and time.monotonic() < end:
            living = int(self.store.get("living")) if self.store.check(["living"]) else self.size
            if self.store.add("parted", 0) >= living:
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
        self.store.set("living", str(len(answers)))
        alike: dict[str, list[int]] = defaultdict(list)
        for rank in range(self.size):
            alike[answers.get(rank, SILENT)].append(rank)
        # The exceptions first: those who said nothing, and what few ranks said.
        found = sorted(alike.items(), key=lambda pair: (pair[0] != SILENT, len(pair[1])))
        lines = [f"rank{'s' if len(ranks) > 1 else ''} {_spans(ranks)}: {text}" for text, ranks in found]
        return "\n  ".join([f"the run does not go on: {self.store.get('alarm').decode()}", *lines])


def _explain(error: BaseException) -> str:
    """What a rank that has failed answers."""
    if not lost_another(error):
        return f"has failed: {type(error).__name__}: {error}"
    return f"stopped at {_line(traceback.extract_tb(error.__traceback__))}: {str(error).splitlines()[0]}"


def _line(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost line of this package."""
    mine = [frame for frame in stack if Path(frame.filename).is_relative_to(PACKAGE)]
    if not mine:
        return "a line outside this program"
    return f"{Path(mine[-1].filename).relative_to(PACKAGE)}:{mine[-1].lineno} in {mine[-1].name}"


def _spans(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    firsts = [n for n in numbers if n - 1 not in numbers]
    lasts = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))
