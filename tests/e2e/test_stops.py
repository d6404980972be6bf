"""Runs that end early, because of a request, or because a rank fails, hangs or is killed. None hangs, and none loses a save."""

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
from torch.distributed import TCPStore

from internevo.checkpoint import storage
from internevo.cli import main
from internevo.data.batches import StepBatch
from internevo.errors import DataError
from internevo.train import watchdog
from internevo.train.step import Stepper, StepResult
from tests.conftest import ROOT, WriteConfig, metrics, rows_so_far
from tests.e2e.test_training import start
from tests.pool import launcher_env
from tests.processes import is_alive, processes_below

Fault = Callable[[int], None]
"""A function that is called with each rank and prepares what goes wrong on it."""
STEP = 3
"""The step in which it goes wrong."""


def _rank(rank: int, size: int, port: int, config: Path, fault: Fault, folder: Path) -> None:
    """Runs one rank, after ``fault(rank)``. Its output is written to a file."""
    output = os.open(folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(launcher_env(rank, size, port), INTERNEVO_DEVICE="cpu", TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    watchdog.Watchdog = partial(watchdog.Watchdog, interval=0.5)  # type: ignore[misc, assignment]
    fault(rank)
    main(["train", str(config)])


class Ranks:
    """A run of several processes with a fault: the exit codes and the output of all ranks."""

    def __init__(self, size: int, config: Path, fault: Fault, folder: Path, seconds: float = 300) -> None:
        # The processes are forks of a server that has imported everything and does nothing else.
        context = multiprocessing.get_context("forkserver")
        # This process has the store, as torchrun does, so that no other program gets its port.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context.set_forkserver_preload([__name__, "internevo.train.trainer"])
        arguments = (size, store.port, config, fault, folder)
        self.processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(size)]
        for process in self.processes:
            process.start()
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        self.codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        self.output = [(folder / f"{rank}.txt").read_text() for rank in range(size)]


def _in_step(number: int, act: Callable[[], None]) -> None:
    """Calls ``act`` at the beginning of a step."""
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
    for output in ended.output:
        assert re.search(r"a step has taken more than \d+ s \(monitor.timeout\) on rank \d\n", output)
        assert "rank 1: at train/trainer.py" in output  # it sleeps before the step begins
        assert "ranks 0, 2: at " in output
        assert "most recent call first" in output  # the stacks of all threads


def _fail(rank: int) -> None:
    def act() -> None:
        raise DataError("there is no more data")

    if rank == 1:
        _in_step(STEP, act)


def _kill(rank: int) -> None:
    if rank == 1:
        _in_step(STEP, lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_all_ranks_report_the_error_of_a_rank_that_fails(config: WriteConfig, tmp_path: Path) -> None:
    ended = Ranks(3, config("failing"), _fail, tmp_path)
    assert ended.codes == [1, 1, 1]
    assert "error: there is no more data" in ended.output[1]
    for rank in (0, 2):
        assert "rank 1: has failed: DataError: there is no more data" in ended.output[rank]


def test_a_rank_that_is_killed_is_named(config: WriteConfig, tmp_path: Path) -> None:
    ended = Ranks(3, config("killed"), _kill, tmp_path)
    assert ended.codes == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        assert "rank 1: no answer: the process has ended" in ended.output[rank]


def _slow_saving(rank: int, then: Fault) -> None:
    """Makes rank 0 write slowly, so that the fault ``then`` happens while a checkpoint is being saved."""
    original = storage.SafetensorsWriter.write_data

    def write(self: storage.SafetensorsWriter, *arguments: Any) -> Any:
        time.sleep(3)
        return original(self, *arguments)

    if rank == 0:
        storage.SafetensorsWriter.write_data = write  # type: ignore[method-assign, assignment]
    then(rank)


@pytest.mark.parametrize("fault", [_fail, _hang], ids=["fails", "hangs"])
def test_a_checkpoint_that_is_being_saved_is_completed_when_a_rank(config: WriteConfig, tmp_path: Path, fault: Fault) -> None:
    path = config("saving", monitor__timeout=1, ckpt__checkpoint_every=STEP - 1)
    ended = Ranks(2, path, partial(_slow_saving, then=fault), tmp_path)
    assert ended.codes == [1, 1]
    assert (tmp_path / "saving" / "checkpoints" / f"step-{STEP - 1:08d}" / "manifest.json").is_file()
    assert len(metrics(tmp_path / "saving")) == STEP - 1


def test_a_checkpoint_that_needs_a_killed_rank_is_abandoned(config: WriteConfig, tmp_path: Path) -> None:
    path = config("saving", ckpt__checkpoint_every=STEP - 1)
    ended = Ranks(2, path, partial(_slow_saving, then=_kill), tmp_path)
    assert ended.codes == [1, -signal.SIGKILL]
    assert "rank 1: no answer: the process has ended" in ended.output[0]


STRESS = bool(os.environ.get("INTERNEVO_TEST_STRESS"))
"""Whether to test many stops, next to processes that keep the CPU busy. It takes an hour on a small machine."""
STOPS, RANKS, BUSY = (40, 4, 2) if STRESS else (2, 2, 0)
PATIENCE = 900 if STRESS else 300
"""Seconds after which a run counts as hanging."""


def _assert_success(process: "subprocess.Popen[str]", folder: Path) -> str:
    """Waits for a run, and returns its output. If it hangs, the error has the stacks of all threads of all processes."""
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
    return str(output)


def _has_reached(step: int, folder: Path) -> bool:
    return len(rows_so_far(folder)) >= step


def _wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout and process.communicate()[0]
        time.sleep(0.02)


@pytest.fixture
def busy() -> Iterator[None]:
    """Processes that keep the CPU busy during a test."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY)]
    yield
    for process in processes:
        process.kill()


@pytest.mark.timeout(STOPS * 1800)
def test_stops_at_random_steps(config: WriteConfig, tmp_path: Path, busy: None) -> None:
    """Each run is stopped once, perhaps while a checkpoint is being saved, and then continued by one process."""
    draw = random.Random(1)
    for number in range(STOPS):
        path = config(f"run{number}", data__total_steps=400, lr_scheduler__total_steps=400, ckpt__checkpoint_every=4)
        folder, step = tmp_path / f"run{number}", draw.randint(1, 14)
        process = start(path, "--nproc", RANKS)
        _wait_until(partial(_has_reached, step, folder), process)
        time.sleep(0.3 * draw.random())
        process.send_signal(signal.SIGTERM)
        _assert_success(process, folder)
        last = metrics(folder)[-1]["step"]
        assert (folder / "checkpoints" / f"step-{last:08d}" / "manifest.json").is_file()
        _assert_success(start(path, f"data.total_steps={last + 2}", "--nproc", 1), folder)
        assert [row["step"] for row in metrics(folder)] == list(range(1, last + 3))
        shutil.rmtree(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_ranks_start_stops_after_the_first_step(
    config: WriteConfig, tmp_path: Path, number: signal.Signals
) -> None:
    """The signal comes before any rank listens to signals. It must not kill any of them. A terminal sends it to all."""
    process = start(config("early"), "--nproc", 2, start_new_session=True)
    _wait_until((tmp_path / "early" / "log" / "rank-00001.stderr").exists, process)
    os.killpg(process.pid, number)
    output = _assert_success(process, tmp_path / "early")
    assert "finishing step 1, then saving, then ending the run" in output and "the same command goes on from there" in output
    assert [row["step"] for row in metrics(tmp_path / "early")] == [1]
    assert (tmp_path / "early" / "checkpoints" / "step-00000001" / "manifest.json").is_file()


def test_ctrl_c_twice_ends_a_run_that_is_starting(config: WriteConfig, tmp_path: Path) -> None:
    process = start(config("early", lr_scheduler__total_steps=8), "--nproc", 2, start_new_session=True)
    _wait_until((tmp_path / "early" / "log" / "rank-00001.stderr").exists, process)
    assert process.stdout is not None
    os.killpg(process.pid, signal.SIGINT)
    assert "Ctrl-C again" in process.stdout.readline() + process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, output
    assert output.endswith("interrupted\n") and "failed" not in output


BIN = Path(sys.executable).parent
LAUNCHERS = {
    "internevo": [sys.executable, "-m", "internevo", "train", "--nproc", "2"],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", str(ROOT / "train.py"), "--config"],
    "torchrun.sh": ["bash", str(ROOT / "deploy" / "torchrun.sh")],
    "a shell below torchrun": [
        str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "--no-python", "bash", "-c",
        f'"{sys.executable}" -m internevo train "$0"; true',
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("launcher", "number", "code"),
    [
        ("internevo", signal.SIGKILL, -signal.SIGKILL),
        ("torchrun", signal.SIGUSR1, -signal.SIGUSR1),
        ("torchrun.sh", signal.SIGTERM, 0),
        ("torchrun.sh", signal.SIGKILL, -signal.SIGKILL),
        ("a shell below torchrun", signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_ranks_save_and_end_when_their_launcher_ends(
    config: WriteConfig, tmp_path: Path, launcher: str, number: signal.Signals, code: int
) -> None:
    path = config("left", data__total_steps=4000, lr_scheduler__total_steps=4000)
    path_of_tools = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    settings = {"PATH": path_of_tools, "OMP_NUM_THREADS": "1", "INTERNEVO_DEVICE": "cpu", "GPUS": "2"}
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(
            [*LAUNCHERS[launcher], str(path)],
            env={**os.environ, **settings},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    _wait_until(partial(_has_reached, 2, tmp_path / "left"), process)
    ranks = processes_below(process.pid)
    process.send_signal(number)
    assert process.wait(PATIENCE) == code
    deadline = time.monotonic() + PATIENCE
    while any(map(is_alive, ranks)):
        assert time.monotonic() < deadline, f"processes {ranks} train on"
        time.sleep(0.05)
    text, last = (tmp_path / "output").read_text(), metrics(tmp_path / "left")[-1]["step"]
    assert f"ends after step {last}" in text and (code or "Traceback" not in text)
    assert (tmp_path / "left" / "checkpoints" / f"step-{last:08d}" / "manifest.json").is_file()
