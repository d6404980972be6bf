"""Which processes ``internevo train`` starts, and when it is a rank itself."""

import re
from pathlib import Path

import pytest

from internevo.commands import train as command
from internevo.errors import InternEvoError, UsageError
from internevo.parallel.launcher import PARENT
from tests.conftest import write_config, write_dataset
from tests.pool import launcher_env

SHELL = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "n1"}
"""The environment of ``srun --pty bash``."""


@pytest.fixture
def config_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RANK", raising=False)
    return write_config(tmp_path, write_dataset(tmp_path / "data"))


def test_nproc_starts_local_processes_in_a_shell_of_slurm(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SHELL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(command, "launch", lambda arguments, processes, *rest: 10 + processes)
    assert command.train(config_path, [], 2) == 12


@pytest.mark.parametrize("size", [1, 4])
def test_nproc_on_a_rank_of_another_number_of_processes_is_refused(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    for name, value in launcher_env(0, size, 1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=re.escape(f"--nproc 2: a launcher has started this process as rank 0 of {size}")):
        command.train(config_path, [], 2)


def test_a_rank_whose_launcher_has_ended_does_not_wait_for_it(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**launcher_env(0, 2, 1), PARENT: "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("internevo.parallel.world.join", lambda *_: pytest.fail("waits"))
    with pytest.raises(InternEvoError, match="the launcher has ended before the run has started"):
        command.train(config_path, [], None)
