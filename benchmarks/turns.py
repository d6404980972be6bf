"""Programs that take their steps in turn, so that they see the same state of a noisy machine.

Each program is one process or several ranks, which wait for a line on standard input before each step. In the worker, ``serve``
answers each line; the benchmark calls ``take_turns``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import IO

from internevo.observe.record import memory_peak
from internevo.parallel.world import pick_device

WARM_UP = 2
"""Steps of each program that are not counted."""
PATIENCE = 30.0
"""Seconds in which the processes of a program must end, once it has ended or one of them has failed."""


def serve(steps: Iterator[float]) -> None:
    """Takes a step for each line of standard input and prints its seconds; at the end, the peak memory in GB."""
    for _ in sys.stdin:
        print(json.dumps(next(steps)), flush=True)
    print(json.dumps(memory_peak(pick_device(0)) / 1e9), flush=True)


class Program:
    """A command that calls ``serve``, in one process or as the ranks of a world on this machine."""

    def __init__(self, command: list[str], ranks: int = 1, threads: int = 1) -> None:
        """
        Args:
            threads: of each process.
        """
        self.command, self.memory = command, 0.0
        """``memory``: peak memory of rank 0 in GB, after the end."""
        self.processes = list[subprocess.Popen[str]]()
        self.errors = list[IO[str]]()
        for variables in worlds(ranks, threads):
            errors = tempfile.TemporaryFile("w+")
            self.errors.append(errors)
            self.processes.append(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                    env={**os.environ, **variables},
                )
            )  # fmt: skip

    def __enter__(self) -> Program:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._stop(0)
            return
        self.memory = self._ask(None)
        if self._stop(PATIENCE):
            self._fail()

    def step(self) -> float:
        """Returns the seconds that a step took on rank 0, when all ranks have ended it."""
        return self._ask("\n")

    def _ask(self, line: str | None) -> float:
        """Writes a line to each process, or closes its input, and returns what rank 0 answers."""
        for process in self.processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # its answer is missing, too
                if line is None:
                    process.stdin.close()
                else:
                    process.stdin.write(line)
                    process.stdin.flush()
        answers = list[str]()
        for process in self.processes:
            assert process.stdout is not None
            answers.append(process.stdout.readline())
        if not all(answers):
            self._stop(PATIENCE)
            self._fail()
        return float(json.loads(answers[0]))

    def _stop(self, patience: float) -> bool:
        """Waits for the processes, and kills those that take longer. Returns whether one has failed by itself."""
        end, failed = time.monotonic() + patience, False
        for process in self.processes:
            try:
                failed |= process.wait(max(0.0, end - time.monotonic())) != 0
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return failed

    def _fail(self) -> None:
        """Ends this program with what the ranks have printed that failed by themselves."""
        lines = [f"{' '.join(self.command)} failed"]
        for rank, (process, errors) in enumerate(zip(self.processes, self.errors, strict=True)):
            if process.returncode not in (0, -signal.SIGKILL):
                errors.seek(0)
                lines.append(f"rank {rank}: {errors.read()[-3000:]}")
        raise SystemExit("\n".join(lines))


def worlds(ranks: int, threads: int) -> list[dict[str, str]]:
    """The environment variables of each rank of a new world, or of a single process."""
    common = {"OMP_NUM_THREADS": str(threads)}
    if ranks == 1:
        return [common]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def take_turns(
    commands: Mapping[str, list[str]], steps: int, ranks: int = 1, threads: int = 1
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Starts programs, and takes one step of each after the other, in the next turn in the reverse order.

    Args:
        commands: name -> command that calls ``serve``.
        ranks, threads: of each program.

    Returns:
        Name -> seconds of ``steps`` steps; the first ``WARM_UP`` ones are left out. Name -> peak memory in GB.
    """
    times: dict[str, list[float]] = {name: [] for name in commands}
    with ExitStack() as stack:
        programs = {name: stack.enter_context(Program(line, ranks, threads)) for name, line in commands.items()}
        for number in range(WARM_UP + steps):
            for name in list(programs)[:: 1 if number % 2 else -1]:
                seconds = programs[name].step()
                if number >= WARM_UP:
                    times[name].append(seconds)
    return times, {name: program.memory for name, program in programs.items()}


def speed_ratio(times: Mapping[str, list[float]], ours: str, theirs: str) -> float:
    """The median over the turns of how many times as fast ours is as theirs."""
    return statistics.median(b / a for a, b in zip(times[ours], times[theirs], strict=True))


def run_processes(command: list[str], number: int) -> str:
    """Runs a command as the ranks of a world on this machine, with one thread each. Returns what rank 0 prints."""
    ranks = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **variables}
        )
        for variables in worlds(number, 1)
    ]  # fmt: skip
    outputs = [rank.communicate() for rank in ranks]
    for rank, (_, errors) in zip(ranks, outputs, strict=True):
        if rank.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{errors[-3000:]}")
    return outputs[0][0]
