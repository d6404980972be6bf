"""A run that the scripts in deploy/ start on several machines trains the same model as one process."""

import os
import stat
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, WriteConfig, metrics
from tests.pool import Pool, free_port

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


def finish(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output


def start(*command: object, env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(part) for part in command], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def assert_one_run(pool: Pool, config: WriteConfig, folder: Path, name: str) -> None:
    pool.train(config("one"))
    rows, wanted = metrics(folder / name), metrics(folder / "one")
    assert len(rows) == len(wanted)
    for row, reference in zip(rows, wanted, strict=True):
        assert abs(row["loss"] - reference["loss"]) <= 1e-5 * reference["loss"]


def test_torchrun_on_two_machines(pool: Pool, config: WriteConfig, tmp_path: Path) -> None:
    path = config("torchrun", parallel__tensor={"size": 2, "mode": "msp"}, model__vocab_size=98)
    env = environment(NODES="2", GPUS="1", HEAD=f"127.0.0.1:{free_port()}")
    finish(*(start("bash", ROOT / "deploy" / "torchrun.sh", path, "seed=7", env=env) for _ in range(2)))
    assert_one_run(pool, lambda name: config(name, seed=7, model__vocab_size=98), tmp_path, "torchrun")


def test_slurm_on_two_machines(pool: Pool, config: WriteConfig, tmp_path: Path) -> None:
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN)
    srun.chmod(srun.stat().st_mode | stat.S_IEXEC)
    env = environment(
        SLURM_JOB_NODELIST="localhost", SLURM_SUBMIT_DIR=str(ROOT), SLURM_CPUS_PER_TASK="1", PORT=str(free_port())
    )
    env["PATH"] = f"{srun.parent}{os.pathsep}{env['PATH']}"
    finish(start("bash", ROOT / "deploy" / "slurm.sbatch", config("slurm"), env=env))
    assert_one_run(pool, config, tmp_path, "slurm")
