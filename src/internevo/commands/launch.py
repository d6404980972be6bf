"""Starting the processes of a run on this machine, when neither torchrun nor Slurm has."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

PARENT = "INTERNEVO_PARENT"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""They ask a run to stop, as in ``train.stop``, which needs PyTorch."""
GRACE = 60.0
"""Seconds that the other processes have to end by themselves when one has failed: a checkpoint may be under way."""


def already_launched() -> bool:
    """Whether torchrun, srun or ``launch`` has started this process as one of several."""
    return "RANK" in os.environ or "SLURM_STEP_ID" in os.environ


def default_processes() -> int:
    """One per GPU, or one."""
    from ..parallel.world import has_gpu

    if not has_gpu():
        return 1
    import torch

    return torch.cuda.device_count()


def launch(arguments: list[str], processes: int, log: Path) -> int:
    """Runs ``python -m internevo ARGUMENTS`` in ``processes`` processes and waits for them.

    Signals go on to the processes. Their error output is in ``log``/rank-N.stderr, and that of the first process that
    failed is shown.

    Returns:
        The first failing process's exit code, or 0.
    """
    import torch.distributed as dist

    # The store lives here and the processes are its clients, so that no port has to be guessed.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", PARENT: str(os.getpid()),
    }  # fmt: skip
    environment = {"OMP_NUM_THREADS": str(max(1, cores // processes)), **os.environ, **shared}
    log.mkdir(parents=True, exist_ok=True)
    errors = [log / f"rank-{rank:05d}.stderr" for rank in range(processes)]
    children: list[subprocess.Popen[bytes]] = []
    asked = _forward_signals(children)
    for rank in range(processes):
        with open(errors[rank], "w") as stderr, _blocked(SIGNALS):
            child = subprocess.Popen(
                [sys.executable, "-m", "internevo", *arguments],
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
        children.append(child)
        for number in asked:
            child.send_signal(number)
    failed = _wait(children, lambda rank: print(_failure(rank, children[rank], errors[rank], processes), file=sys.stderr))
    if failed is None:
        return 0
    code = children[failed].returncode
    return code if code > 0 else 1


@contextmanager
def _blocked(signals: tuple[int, ...]) -> Iterator[None]:
    """Processes that are started meanwhile have these signals blocked, until they listen to them (``StopRequests``)."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _forward_signals(children: list[subprocess.Popen[bytes]]) -> list[int]:
    """Sends signals on to all processes there are. Returns a list of those that have come, for processes started later."""
    asked: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    interrupts: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        # A terminal sends Ctrl-C to the processes as well; they finish their step and save. The second time they end at once.
        interrupts.append(number)
        if len(interrupts) > 1:
            forward(signal.SIGKILL, None)

    for number in SIGNALS:
        signal.signal(number, forward)
    signal.signal(signal.SIGINT, interrupt)
    return asked


def _wait(children: list[subprocess.Popen[bytes]], tell: Callable[[int], None]) -> int | None:
    """Waits for all. Returns the rank that failed first, after ending those that wait for it in vain; ``tell`` has been called
    with it as soon as it had failed."""
    failed, deadline = None, float("inf")
    while True:
        codes = [child.poll() for child in children]
        if failed is None and any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
            tell(failed)
            deadline = time.monotonic() + GRACE
        if None not in codes:
            return failed
        if time.monotonic() > deadline:
            for child in children:
                if child.poll() is None:
                    child.kill()
        time.sleep(0.05)


def _failure(rank: int, child: subprocess.Popen[bytes], errors: Path, processes: int) -> str:
    """What there is to say about a rank that has failed."""
    text = errors.read_text(errors="replace").rstrip()[-4000:]
    if child.returncode < 0:
        text += f"\nkilled by {signal.Signals(-child.returncode).name}"
        text += " (out of memory?)" if child.returncode == -signal.SIGKILL else ""
    return f"rank {rank} of {processes} failed:\n{text.strip()}"


def die_with_parent() -> None:
    """Ends this process when the launcher is killed, so that nothing goes on training behind the user's back (Linux)."""
    parent = os.environ.get(PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)
