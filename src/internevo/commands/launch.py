"""Starts the processes of a run on this machine, if neither torchrun nor Slurm has started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Self

from ..parallel.launcher import PARENT, STOP_SIGNALS

GRACE = 60.0
"""Seconds after a process has failed, in which the others may end by themselves; they may be saving a checkpoint."""


def default_processes() -> int:
    """Returns the default number of processes: one per GPU, or 1 without GPUs."""
    from ..parallel.world import has_gpu

    if not has_gpu():
        return 1
    import torch

    return torch.cuda.device_count()


def launch(
    arguments: list[str], processes: int, log: Path, variables: dict[str, str] | None = None, pass_fds: tuple[int, ...] = ()
) -> int:
    """Runs ``python -m internevo ARGUMENTS`` in ``processes`` processes, and waits for them.

    Signals are forwarded to the processes. If a process fails, its standard error is printed.

    Args:
        log: folder to which the standard error of each process is written, as rank-N.stderr.
        variables, pass_fds: environment variables and open files that only rank 0 gets.

    Returns:
        0, or the exit code of the first process that failed.
    """
    import torch.distributed as dist

    from ..observe.facts import COMMAND, command

    # This process has the store, and the others are its clients. So the system can choose a free port.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", PARENT: str(os.getpid()),
        COMMAND: command(),
    }  # fmt: skip
    environment = {"OMP_NUM_THREADS": str(max(1, cores // processes)), **os.environ, **shared}
    log.mkdir(parents=True, exist_ok=True)
    errors = [log / f"rank-{rank:05d}.stderr" for rank in range(processes)]
    children: list[subprocess.Popen[bytes]] = []

    def print_failure(rank: int) -> None:
        interrupted = signal.SIGKILL in signals.sent
        print("interrupted" if interrupted else _failure(rank, children[rank], errors[rank], processes), file=sys.stderr)

    with _Signals(children) as signals:
        for rank in range(processes):
            with open(errors[rank], "w") as stderr, _blocked((*STOP_SIGNALS, signal.SIGINT)):
                child = subprocess.Popen(
                    [sys.executable, "-m", "internevo", *arguments],
                    stderr=stderr,
                    stdin=subprocess.DEVNULL,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), **(variables or {} if rank == 0 else {})},
                    pass_fds=pass_fds if rank == 0 else (),
                )
            children.append(child)
            for number in signals.sent:
                child.send_signal(number)
        failed = _wait(children, print_failure)
    if failed is None:
        return 0
    code = children[failed].returncode
    return code if code > 0 else 1


@contextmanager
def _blocked(signals: tuple[int, ...]) -> Iterator[None]:
    """Processes that are started in this context have these signals blocked until ``StopRequests`` unblocks them."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Signals:
    """A context in which the signals that this process receives are forwarded to all ``children``."""

    def __init__(self, children: list[subprocess.Popen[bytes]]) -> None:
        self.children = children
        self.sent: list[int] = []
        """The signals sent so far, for processes that are started later."""
        self.interrupts = 0
        """Number of Ctrl-C."""

    def __enter__(self) -> Self:
        forwarded = [n for n in STOP_SIGNALS if signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores SIGHUP
        self.before = {number: signal.signal(number, self.forward) for number in forwarded}
        self.before[signal.SIGINT] = signal.signal(signal.SIGINT, self.interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def forward(self, number: int, _frame: FrameType | None = None) -> None:
        """Sends a signal to the processes that are running."""
        self.sent.append(number)
        for child in self.children:
            if child.poll() is None:
                child.send_signal(number)

    def interrupt(self, _number: int, _frame: FrameType | None) -> None:
        """After the first Ctrl-C the processes finish their step and save, and after the second they are killed."""
        self.interrupts += 1  # first: the next Ctrl-C may come while this one is handled
        if self.interrupts > 1:
            self.forward(signal.SIGKILL)
        else:
            # Not with print: this process may be printing.
            os.write(
                2,
                (b"\n" if os.isatty(2) else b"")
                + b"Ctrl-C: the run finishes its step, saves and ends. Ctrl-C again ends it immediately.\n",
            )
            self.forward(signal.SIGTERM)


def _wait(children: list[subprocess.Popen[bytes]], on_failure: Callable[[int], None]) -> int | None:
    """Waits for all processes. After one has failed, ends those that have not ended within ``GRACE`` seconds.

    Args:
        on_failure: is called with the rank that failed first, as soon as it has failed.

    Returns:
        The rank that failed first, or None.
    """
    failed, deadline = None, float("inf")
    while True:
        codes = [child.poll() for child in children]
        if failed is None and any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
            on_failure(failed)
            deadline = time.monotonic() + GRACE
        if None not in codes:
            return failed
        if time.monotonic() > deadline:
            for child in children:
                if child.poll() is None:
                    child.kill()
        time.sleep(0.05)


def _failure(rank: int, child: subprocess.Popen[bytes], errors: Path, processes: int) -> str:
    """Returns a message about a rank that has failed: its standard error, and the signal that killed it."""
    text = errors.read_text(errors="replace").rstrip()[-4000:]
    how = f"exit code {child.returncode}"
    if child.returncode < 0:
        how = f"killed by {signal.Signals(-child.returncode).name}"
        how += " (out of memory?)" if child.returncode == -signal.SIGKILL else ""
    return (
        f"rank {rank} of {processes} failed: {how}; {f'{errors} ends with' if text else f'{errors} is empty'}\n{text}".rstrip()
    )
