"""Runs that lose a machine or a rank, and go on from the last checkpoint. A machine is an agent of torchrun with one rank."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from tests.conftest import ROOT, WriteConfig, rows_so_far
from tests.e2e.test_launch import assert_one_run, environment, finish, start
from tests.pool import Pool
from tests.processes import is_alive, processes_below, rank_of

STEPS, EVERY = 40, 4
PATIENCE = 300.0
"""Seconds after which a run counts as hanging."""
LONG = {"data__total_steps": STEPS, "lr_scheduler__total_steps": STEPS}


class Machines:
    """The machines of a run, each a ``deploy/torchrun.sh``."""

    def __init__(self, count: int, config: Path) -> None:
        # The test has the store in which the agents meet, so that no other program gets its port.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.env = environment(
            NODES=str(count), GPUS="1", HEAD=f"127.0.0.1:{self.store.port}", RESTARTS="2", PET_MONITOR_INTERVAL="0.1",
            PET_LOCAL_ADDR="127.0.0.1", PET_RDZV_CONF="keep_alive_interval=1,keep_alive_max_attempt=3",
        )  # fmt: skip
        self.config = config
        self.seen: set[int] = set()
        """All processes of all machines so far."""
        self.scripts = [self._new() for _ in range(count)]

    def _new(self) -> subprocess.Popen[str]:
        return start("bash", ROOT / "deploy" / "torchrun.sh", self.config, env=self.env)

    def look(self) -> dict[int, subprocess.Popen[str]]:
        """Returns rank -> its machine, and remembers the processes."""
        found = {}
        for script in self.scripts:
            below = processes_below(script.pid)
            self.seen |= {script.pid, *below}
            found.update({rank: script for process in below if (rank := rank_of(process)) is not None})
        return found

    def lose(self, rank: int) -> None:
        """Kills all processes of the machine of a rank."""
        script = self.look()[rank]
        for process in (*reversed(processes_below(script.pid)), script.pid):
            with suppress(ProcessLookupError):  # a part of the script that has ended because another has
                os.kill(process, signal.SIGKILL)
        script.wait()
        self.scripts.remove(script)

    def add(self) -> None:
        """Adds a machine."""
        self.scripts.append(self._new())


@pytest.fixture
def killed_at_the_end() -> Iterator[list[Machines]]:
    made: list[Machines] = []
    yield made
    for machines in made:
        machines.look()
        for process in machines.seen:
            if is_alive(process):
                os.kill(process, signal.SIGKILL)


def _wait_for_step(step: int, folder: Path, processes: list["subprocess.Popen[str]"]) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(rows_so_far(folder)) < step:
        ended = [process.communicate()[0] for process in processes if process.poll() is not None]
        assert not ended and time.monotonic() < deadline, ended
        time.sleep(0.02)


@pytest.mark.parametrize(("count", "lost"), [(2, 1), (4, 0)])
def test_a_machine_that_is_lost_is_replaced(
    pool: Pool, config: WriteConfig, tmp_path: Path, killed_at_the_end: list[Machines], count: int, lost: int
) -> None:
    """Rank 0, too, which has the lock of the run folder and the store of the ranks."""
    path = config("lost", ckpt__checkpoint_every=EVERY, **LONG)
    machines = Machines(count, path)
    killed_at_the_end.append(machines)
    _wait_for_step(EVERY + 2, tmp_path / "lost", machines.scripts)
    machines.lose(lost)
    machines.add()
    _wait_for_step(STEPS, tmp_path / "lost", machines.scripts)
    machines.look()
    assert "loaded all from" in finish(*machines.scripts)
    deadline = time.monotonic() + PATIENCE
    while left := [process for process in machines.seen if is_alive(process)]:  # a script's last process sees that it has ended
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert_one_run(pool, lambda name: config(name, **LONG), tmp_path, "lost", count)


def test_torchrun_restarts_the_ranks_after_one_has_failed(pool: Pool, config: WriteConfig, tmp_path: Path) -> None:
    """The agent and its store live on, with all that the ranks before have written to it."""
    path, folder = config("failed", ckpt__checkpoint_every=EVERY, **LONG), tmp_path / "failed"
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.1"]
    process = start(*command, ROOT / "train.py", "--config", path, "--launcher", "torch", env=environment())
    _wait_for_step(EVERY + 2, folder, [process])
    os.kill(next(p for p in processes_below(process.pid) if rank_of(p) == 1), signal.SIGKILL)
    assert "loaded all from" in finish(process)
    assert_one_run(pool, lambda name: config(name, **LONG), tmp_path, "failed", 2)
