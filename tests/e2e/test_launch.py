"""A run that the scripts in deploy/ start on several machines trains the same model as one process."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from tests.conftest import ROOT, WriteConfig, metrics, tiny
from tests.pool import Pool

SRUN = """#!/bin/sh
# Two machines with one task each.
while [ "${1#--}" != "$1" ]; do shift; done
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_STEP_ID=0 "$@" &
done
wait %1 && wait %2
"""


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "INTERNEVO_DEVICE": "cpu", "GLOO_SOCKET_IFNAME": "lo", **more}


def finish(*processes: subprocess.Popen[str]) -> str:
    """Waits for processes, which must succeed. Returns what they have printed."""
    printed = ""
    for process in processes:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
        printed += output
    return printed


def start(*command: object, env: dict[str, str], cwd: Path = ROOT) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(part) for part in command], env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


PYTHON = Path(sys.executable)
COMMANDS = {
    "internevo": [str(PYTHON.parent / "internevo"), "train"],
    "python -m internevo": [str(PYTHON), "-m", "internevo", "train"],
    "train.py": [str(PYTHON), str(ROOT / "train.py"), "--config"],
    "torchrun": [str(PYTHON.parent / "torchrun"), "--standalone", "--nproc-per-node", "2", str(ROOT / "train.py"), "--config"],
}
SHADOWS = ("random", "copy", "tokenize", "torch", "numpy", "queue", "json", "token", "html", "socket")
"""Modules that a user's folder has too."""
STARTUP = ("types", "enum", "typing")
"""The same for modules that ``python -m`` itself imports before it runs anything."""


@pytest.mark.parametrize("name", COMMANDS)
def test_modules_of_the_users_folder_replace_none_of_pythons(tmp_path: Path, name: str) -> None:
    """Nor installed ones: neither here, nor in the processes that are started, nor while the config is read."""
    for module in SHADOWS + (STARTUP if "-m" not in name else ()):
        (tmp_path / f"{module}.py").write_text("raise RuntimeError('a module of the user')\n")
    values = tiny(ckpt={"enable_save_ckpt": False}, data__type="mocked", data__total_steps=1, data__train_folder=None)
    (tmp_path / "own.py").write_text("STEPS = 1\n")
    (tmp_path / "config.py").write_text(
        "import random, torch\nfrom own import STEPS\n" + "".join(f"{key} = {value!r}\n" for key, value in values.items())
    )
    more = ["--nproc", "2"] if "internevo" in name else []
    finish(start(*COMMANDS[name], "config.py", *more, env=environment(INTERNEVO_DEVICE="cpu"), cwd=tmp_path))
    assert len(metrics(tmp_path / "runs" / "tiny")) == 1


def assert_one_run(pool: Pool, config: WriteConfig, folder: Path, name: str, processes: int = 1) -> None:
    """Compares a run with one from beginning to end on this machine."""
    pool.train(config("one"), processes)
    rows, wanted = metrics(folder / name), metrics(folder / "one")
    assert len(rows) == len(wanted)
    for row, reference in zip(rows, wanted, strict=True):
        assert abs(row["loss"] - reference["loss"]) <= 1e-5 * reference["loss"]


def test_torchrun_on_two_machines(pool: Pool, config: WriteConfig, tmp_path: Path) -> None:
    path = config("torchrun", parallel__tensor={"size": 2, "mode": "msp"}, model__vocab_size=98)
    # The test has the store in which the agents meet, so that no other program gets its port.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = environment(NODES="2", GPUS="1", HEAD=f"127.0.0.1:{store.port}")
    finish(*(start("bash", ROOT / "deploy" / "torchrun.sh", path, "seed=7", env=env) for _ in range(2)))
    assert_one_run(pool, lambda name: config(name, seed=7, model__vocab_size=98), tmp_path, "torchrun")


def test_slurm_on_two_machines(pool: Pool, config: WriteConfig, tmp_path: Path) -> None:
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN)
    srun.chmod(srun.stat().st_mode | stat.S_IEXEC)
    env = environment(
        SLURM_JOB_NODELIST="localhost", SLURM_SUBMIT_DIR=str(ROOT), SLURM_CPUS_PER_TASK="1", SLURM_JOB_ID=str(os.getpid())
    )
    env["PATH"] = f"{srun.parent}{os.pathsep}{env['PATH']}"
    finish(start("bash", ROOT / "deploy" / "slurm.sbatch", config("slurm"), env=env))
    assert_one_run(pool, config, tmp_path, "slurm")
