"""Processes that are started once and reused: tests run trainings and functions in them without importing PyTorch each time."""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

DEVICE = os.environ.get("INTERNEVO_TEST_DEVICE", "cpu")
"""Device of the runs: "cpu", or "cuda" for any number of GPUs."""
PATIENCE = 5.0
"""Seconds in which the other ranks must end after one has failed."""


def _work(rank: int, pipe: Connection) -> None:
    """Runs jobs one after the other. A job is (environment, function, arguments)."""
    os.environ.update(launcher_env(rank, 1, 0), INTERNEVO_PARENT=str(os.getppid()))
    import torch

    faulthandler.enable()  # prints the stacks after a crash
    torch.set_num_threads(1)
    pipe.send_bytes(b"ready")
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return  # the tests have ended
        try:
            environment, function, arguments = pickle.loads(message)
            os.environ.update(environment)
            answer = pickle.dumps((function(*arguments), None))
        except BaseException:
            answer = pickle.dumps((None, traceback.format_exc()))
        pipe.send_bytes(answer)


def _train(path: Path, overrides: tuple[str, ...]) -> None:
    from internevo.commands.train import train

    train(path, list(overrides), None, launcher="torch")


def _join_and_call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    from internevo.parallel.launcher import read_launcher
    from internevo.parallel.world import join

    with join(read_launcher(os.environ, launcher="torch")) as world:
        return function(world, *arguments)


def launcher_env(rank: int, size: int, port: int, device: str = DEVICE) -> dict[str, str]:
    """Returns the environment variables that a launcher sets for one process on this machine."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "INTERNEVO_DEVICE": device, **shared_gpu(rank),
    }  # fmt: skip


def shared_gpu(rank: int) -> dict[str, str]:
    """Returns what lets several ranks share a GPU: NCCL refuses that for ranks of one host, so each gets its own host id."""
    if DEVICE == "cpu":
        return {}
    import torch

    return {"NCCL_HOSTID": str(rank), "NCCL_SOCKET_IFNAME": "lo"} if torch.cuda.device_count() == 1 else {}


@contextmanager
def _measured(measured: bool) -> Iterator[None]:
    """Decides whether coverage measures the processes started in this context. (Two ranks suffice; measuring takes time.)"""
    config = None if measured else os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
    try:
        yield
    finally:
        if config is not None:
            os.environ["COVERAGE_PROCESS_CONFIG"] = config


class Pool:
    """A pool of processes. They are started when they are first needed."""

    def __init__(self) -> None:
        self.workers: list[tuple[BaseProcess, Connection]] = []
        atexit.register(self.stop)

    def train(self, path: Path, processes: int = 1, *overrides: str, timeout: float = 400) -> None:
        """Runs ``internevo train PATH OVERRIDES`` on several processes.

        Raises:
            AssertionError: with the tracebacks, in the order in which the ranks have failed.
        """
        self._do(_train, (path, overrides), processes, timeout, DEVICE)

    def run_alone(self, function: Callable[..., Any], processes: int, *arguments: Any, timeout: float = 400) -> list[Any]:
        """As ``run``, for a function that joins the world itself, as training does. It does not get a world."""
        return self._do(function, arguments, processes, timeout, DEVICE)

    def run(
        self, function: Callable[..., Any], processes: int, *arguments: Any, timeout: float = 120, device: str = DEVICE
    ) -> list[Any]:
        """Runs ``function(world, *arguments)`` on every rank of several processes. Returns what each rank has returned.

        Args:
            function: a function of a module, since the processes must import it. Arguments and results are pickled.
            timeout: seconds for all ranks together.
            device: "cpu" if GPUs must not be used.

        Raises:
            AssertionError: with the tracebacks, in the order in which the ranks have failed.
        """
        return self._do(_join_and_call, (function, arguments), processes, timeout, device)

    def _do(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], processes: int, timeout: float, device: str
    ) -> list[Any]:
        from torch.distributed import TCPStore

        self._start(processes)
        # The pool has the store, as torchrun does, so that no other program gets its port.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank, (_, pipe) in enumerate(self.workers[:processes]):
            environment = {**launcher_env(rank, processes, store.port, device), "TORCHELASTIC_USE_AGENT_STORE": "True"}
            pipe.send_bytes(pickle.dumps((environment, function, arguments)))
        results, failures = self._answers(processes, timeout)
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return results

    def _start(self, processes: int) -> None:
        context, running = multiprocessing.get_context("spawn"), len(self.workers)
        for rank in range(running, processes):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, theirs), daemon=True)
            with _measured(rank < 2):
                process.start()
            theirs.close()  # so that the pipe is closed when the process ends
            self.workers.append((process, mine))
        for _, pipe in self.workers[running:]:
            assert pipe.recv_bytes() == b"ready"  # so that the start does not count as time of a job

    def _answers(self, processes: int, timeout: float) -> tuple[list[Any], list[str]]:
        """Returns the result of each rank, and the failures in the order in which they happened."""
        results: list[Any] = [None] * processes
        failures: list[str] = []
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self.workers[:processes])}
        end = time.monotonic() + timeout
        while waiting and (ready := wait(list(waiting), max(0.0, end - time.monotonic()))):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    results[rank], error = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    process, _ = self.workers[rank]
                    process.join(PATIENCE)
                    error = f"the process ended with exit code {process.exitcode}"
                if error:
                    failures.append(f"rank {rank}: {error}")
                    end = min(end, time.monotonic() + PATIENCE)
        return results, failures + [f"rank {rank} did not finish" for rank in waiting.values()]

    def stop(self, patience: float = 0.0) -> None:
        """Ends all processes. The next job starts new ones.

        Args:
            patience: seconds in which an idle process may write its coverage before it is killed.
        """
        for _, pipe in self.workers:
            pipe.close()
        for process, _ in self.workers:
            process.join(patience)
            process.kill()
        self.workers = []
