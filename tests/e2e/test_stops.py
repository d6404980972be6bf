"""Runs that end early: asked to, because a rank fails, or because one hangs. None waits for ever, none loses a save."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from internevo.checkpoint import storage
from internevo.cli import main
from internevo.data.batches import StepBatch
from internevo.errors import DataError
from internevo.train import watchdog
from internevo.train.step import Stepper, StepResult
from tests.conftest import metrics, rows_so_far
from tests.e2e.test_training import start
from tests.pool import free_port, place

Fault = Callable[[int], None]
"""Prepares, on every rank, what goes wrong on some."""
WriteConfig = Callable[..., Path]
STEP = 3
"""The step in which something happens."""


def _rank(rank: int, size: int, port: int, config: Path, fault: Fault, folder: Path) -> None:
    """One rank of a run, with ``fault(rank)`` to prepare what goes wrong; its output goes to a file."""
    output = os.open(folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(place(rank, size, port), INTERNEVO_DEVICE="cpu")
    torch.set_num_threads(1)
    watchdog.Watchdog = partial(watchdog.Watchdog, interval=0.5)  # type: ignore[misc, assignment]
    fault(rank)
    main(["train", str(config)])


class Ranks:
    """A run of several processes with a fault: what became of it."""

    def __init__(self, size: int, config: Path, fault: Fault, folder: Path, seconds: float = 300) -> None:
        # The processes are forks of one that has imported everything, and is nothing else.
        context, port = multiprocessing.get_context("forkserver"), free_port()
        context.set_forkserver_preload([__name__, "internevo.train.trainer"])
        self.processes = [context.Process(target=_rank, args=(rank, size, port, config, fault, folder)) for rank in range(size)]
        for process in self.processes:
            process.start()
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        self.codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        self.said = [(folder / f"{rank}.txt").read_text() for rank in range(size)]


def _in_step(number: int, act: Callable[[], None]) -> None:
    """Lets ``act`` happen at the beginning of a step."""
    original = Stepper.__call__

    def call(self: Stepper, batch: StepBatch, *arguments: Any) -> StepResult:
        if batch.number + 1 == number:
            act()
        return original(self, batch, *arguments)

    Stepper.__call__ = call  # type: ignore[method-assign, assignment]


def _hang(rank: int) -> None:
    if rank == 1:
        _in_step(STEP, lambda: time.sleep(3600))


def test_a_rank_that_hangs_ends_the_run_and_is_named(config: WriteConfig, tmp_path: Path) -> None:
    path = config("hanging", monitor__timeout=2, ckpt__enable_save_ckpt=False)
    ended = Ranks(3, path, _hang, tmp_path)
    assert ended.codes == [1, 1, 1]
    for said in ended.said:
        assert re.search(r"a step has taken more than \d+ s \(monitor.timeout\) on rank \d\n", said)
        assert "rank 1: at train/trainer.py" in said  # it sleeps before the step begins
        assert "ranks 0, 2: at " in said
        assert "most recent call first" in said  # every thread's stack


def _fail(rank: int) -> None:
    def act() -> None:
        raise DataError("there is no more data")

    if rank == 1:
        _in_step(STEP, act)


def _vanish(rank: int) -> None:
    if rank == 1:
        _in_step(STEP, lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_rank_that_fails_tells_the_others_why(config: WriteConfig, tmp_path: Path) -> None:
    ended = Ranks(3, config("failing"), _fail, tmp_path)
    assert ended.codes == [1, 1, 1]
    assert "error: there is no more data" in ended.said[1]
    for rank in (0, 2):
        assert "rank 1: has failed: DataError: there is no more data" in ended.said[rank]


def test_a_rank_that_is_gone_is_named(config: WriteConfig, tmp_path: Path) -> None:
    ended = Ranks(3, config("vanishing"), _vanish, tmp_path)
    assert ended.codes == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        assert "rank 1: no answer: it is gone" in ended.said[rank]


def _slow_saving(rank: int, then: Fault) -> None:
    """Rank 0 takes its time to write, so that what comes next comes while a checkpoint is under way."""
    original = storage.SafetensorsWriter.write_data

    def write(self: storage.SafetensorsWriter, *arguments: Any) -> Any:
        time.sleep(3)
        return original(self, *arguments)

    if rank == 0:
        storage.SafetensorsWriter.write_data = write  # type: ignore[method-assign, assignment]
    then(rank)


@pytest.mark.parametrize("fault", [_fail, _hang], ids=["fails", "hangs"])
def test_a_checkpoint_under_way_is_finished_when_a_rank(config: WriteConfig, tmp_path: Path, fault: Fault) -> None:
    path = config("saving", monitor__timeout=1, ckpt__checkpoint_every=STEP - 1)
    ended = Ranks(2, path, partial(_slow_saving, then=fault), tmp_path)
    assert ended.codes == [1, 1]
    assert (tmp_path / "saving" / "checkpoints" / f"step-{STEP - 1:08d}" / "manifest.json").is_file()
    assert len(metrics(tmp_path / "saving")) == STEP - 1


def test_a_checkpoint_whose_rank_is_gone_is_given_up(config: WriteConfig, tmp_path: Path) -> None:
    path = config("saving", ckpt__checkpoint_every=STEP - 1)
    ended = Ranks(2, path, partial(_slow_saving, then=_vanish), tmp_path)
    assert ended.codes == [1, -signal.SIGKILL]
    assert "rank 1: no answer: it is gone" in ended.said[0]


STRESS = bool(os.environ.get("INTERNEVO_TEST_STRESS"))
"""Many stops, beside busy processes: an hour on a small machine."""
STOPS, RANKS, BUSY = (40, 4, 2) if STRESS else (2, 2, 0)
PATIENCE = 900 if STRESS else 300
"""Seconds after which a run is taken to hang."""


def _ends_well(process: "subprocess.Popen[str]", folder: Path) -> None:
    """Waits for a run. Where it hangs, all its processes show where each of their threads is."""
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        for rank in ranks:
            os.kill(int(rank), signal.SIGABRT)
        output, _ = process.communicate()
        stacks = [path.read_text() for path in sorted((folder / "log").glob("*.stderr"))]
        raise AssertionError("\n".join([f"a run of {len(ranks)} processes hung", output, *stacks])) from None
    assert process.returncode == 0, output


def _has_come_to(step: int, folder: Path) -> bool:
    return len(rows_so_far(folder)) >= step


def _wait_until(there: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + PATIENCE
    while not there():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)


@pytest.fixture
def busy() -> Iterator[None]:
    """Processes that compute beside a test."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY)]
    yield
    for process in processes:
        process.kill()


@pytest.mark.timeout(STOPS * 1800)
def test_stops_at_random_steps(config: WriteConfig, tmp_path: Path, busy: None) -> None:
    """Each in a run of its own, then one process goes on; a save may be under way or not."""
    draw = random.Random(1)
    for number in range(STOPS):
        path = config(f"run{number}", data__total_steps=400, lr_scheduler__total_steps=400, ckpt__checkpoint_every=4)
        folder, step = tmp_path / f"run{number}", draw.randint(1, 14)
        process = start(path, "--nproc", RANKS)
        _wait_until(partial(_has_come_to, step, folder), process)
        time.sleep(0.3 * draw.random())
        process.send_signal(signal.SIGTERM)
        _ends_well(process, folder)
        last = metrics(folder)[-1]["step"]
        assert (folder / "checkpoints" / f"step-{last:08d}" / "manifest.json").is_file()
        _ends_well(start(path, f"data.total_steps={last + 2}", "--nproc", 1), folder)
        assert [row["step"] for row in metrics(folder)] == list(range(1, last + 3))
        shutil.rmtree(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_ranks_start_stops_after_the_first_step(config: WriteConfig, tmp_path: Path, number: int) -> None:
    """It comes when no rank can have heard of it yet, and kills none."""
    process = start(config("early"), "--nproc", 2)
    _wait_until((tmp_path / "early" / "log" / "rank-00001.stderr").exists, process)
    process.send_signal(number)
    _ends_well(process, tmp_path / "early")
    assert [row["step"] for row in metrics(tmp_path / "early")] == [1]
    assert (tmp_path / "early" / "checkpoints" / "step-00000001" / "manifest.json").is_file()
