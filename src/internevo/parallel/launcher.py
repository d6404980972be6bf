"""What a launcher and its ranks agree on: what torchrun or Slurm writes to the environment of a process (its rank, and where
the ranks meet), and which signals stop a run. Without PyTorch."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import UsageError

PARENT = "INTERNEVO_PARENT"
"""Environment variable with the process id of the launcher, in the processes that ``internevo`` starts."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""These signals and Ctrl-C ask a run to stop. SIGHUP does not if it is ignored, as under nohup."""
PORT = 8888
"""Port of the first host under Slurm, if nothing else is known."""
FIRST_PORT, PORTS = 10_000, 20_000
"""Ports that are derived from a job's number: below those that Linux gives to programs that ask for any port."""
LAST_PORT = 65_535
FIRST_SPECIAL_STEP = 0xFFFF_FFF0
"""Slurm's numbers from here on are not steps of srun, but the shell of an allocation (salloc) or the script of sbatch."""
FIRST_HOST = re.compile(r"([^\[\],\s](?:[^\[\],\s]|\[\d[\d,:-]*\])*)(?:,|$)")
"""Matches the first part of a Slurm node list: a name with any number of lists of numbers and ranges in brackets."""
FIRST_NUMBER = re.compile(r"\[(\d+)[^\]]*\]")
"""Matches such a list."""


@dataclass(frozen=True)
class LauncherInfo:
    """What the launcher has written to the environment of this process."""

    rank: int
    size: int
    """Number of ranks."""
    local_rank: int
    """Number of this process on its node, from 0."""
    address: str | None
    """URL for ``torch.distributed.rendezvous``; None for a single process without a launcher."""


def launched_by(env: Mapping[str, str]) -> str | None:
    """Returns which launcher has started this process as a rank of a run: "torch", "slurm", or None.

    A step of srun with a single task counts as none. It may be a shell in an allocation (``srun --pty``), from which local
    processes are started.

    Raises:
        UsageError: if a variable of the launcher is missing or wrong.
    """
    if env.get("RANK"):
        return "torch"
    variables = _Variables(env, "slurm", asked=False)
    if not env.get("SLURM_STEP_ID") or variables.number("SLURM_STEP_ID") >= FIRST_SPECIAL_STEP:
        return None
    return "slurm" if _tasks(variables) > 1 else None


def read_launcher(env: Mapping[str, str], port: int | None = None, launcher: str | None = None) -> LauncherInfo:
    """Reads the environment variables of torchrun or Slurm.

    Args:
        env: the environment.
        port: port of the first host, under Slurm; None: MASTER_PORT, or one that is derived from the job's number.
        launcher: "torch" or "slurm"; None: whichever has set its variables.

    Raises:
        UsageError: if a variable of the launcher is missing or wrong.
    """
    found = launcher or launched_by(env)
    if found is None:
        return LauncherInfo(0, 1, 0, None)
    if port is not None and not 0 < port <= LAST_PORT:
        raise UsageError(f"--port {port} is not a number from 1 to {LAST_PORT}")
    variables = _Variables(env, found, asked=launcher is not None)
    if found == "slurm":
        size = _tasks(variables)
        rank, local_rank = (variables.number(name, high=size - 1) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
        host = _slurm_host(variables)
        address = f"[{host}]" if ":" in host else host  # IPv6
        return LauncherInfo(rank, size, local_rank, f"tcp://{address}:{port or _slurm_port(variables)}")
    variables.number("RANK")  # the first to be named if it is missing
    size = variables.number("WORLD_SIZE", low=1)
    rank, local_rank = (variables.number(name, high=size - 1) for name in ("RANK", "LOCAL_RANK"))
    variables.text("MASTER_ADDR")
    variables.number("MASTER_PORT", high=LAST_PORT)
    return LauncherInfo(rank, size, local_rank, "env://")


class _Variables:
    """The environment variables of a launcher. Empty ones count as missing."""

    COMMAND: ClassVar = {"torch": "torchrun", "slurm": "srun"}
    SIGN: ClassVar = {"torch": "RANK", "slurm": "SLURM_STEP_ID"}
    """The variable that says that a launcher has started a process."""

    def __init__(self, env: Mapping[str, str], launcher: str, asked: bool) -> None:
        """``asked``: whether the user has named the launcher (--launcher)."""
        self.env, self.command = env, self.COMMAND[launcher]
        sign = self.SIGN[launcher]
        self.advice = f"start this command with {self.command}, or {'leave out --launcher' if asked else f'unset {sign}'}"
        self.reason = "" if asked else f" although {sign} is, as under {self.command}"

    def first(self, *names: str) -> str | None:
        """Returns the first of these variables that is set."""
        return next((name for name in names if self.env.get(name)), None)

    def text(self, *names: str) -> str:
        """Returns the value of the first of these variables that is set."""
        name = self.first(*names)
        if name is None:
            raise UsageError(f"{names[-1]} is not set{self.reason}: {self.advice}")
        return self.env[name]

    def number(self, *names: str, low: int = 0, high: int | None = None) -> int:
        """Returns the same as a number from ``low`` to ``high``."""
        text = self.text(*names)
        if not (text.isascii() and text.isdigit() and low <= int(text) and (high is None or int(text) <= high)):
            wanted = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise UsageError(f"{self.first(*names)} = {text!r} is not a number {wanted}: {self.advice}")
        return int(text)


def _tasks(variables: _Variables) -> int:
    """Returns the number of tasks of this step of srun. SLURM_NTASKS may be that of the allocation."""
    return variables.number("SLURM_STEP_NUM_TASKS", "SLURM_NPROCS", "SLURM_NTASKS", low=1)


def _slurm_host(variables: _Variables) -> str:
    if variables.first("MASTER_ADDR"):
        return variables.text("MASTER_ADDR")
    names = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
    return first_host(variables.text(*names), variables.first(*names) or names[-1])


def _slurm_port(variables: _Variables) -> int:
    """Returns MASTER_PORT; or a port that differs between the jobs and steps that run at the same time on a node."""
    if variables.first("MASTER_PORT"):
        return variables.number("MASTER_PORT", low=1, high=LAST_PORT)
    if variables.first("SLURM_JOB_ID", "SLURM_JOBID") is None:
        return PORT
    step = variables.number("SLURM_STEP_ID") if variables.first("SLURM_STEP_ID") else 0
    return FIRST_PORT + (31 * variables.number("SLURM_JOB_ID", "SLURM_JOBID") + step) % PORTS


def first_host(nodes: str, variable: str = "SLURM_JOB_NODELIST") -> str:
    """Returns the first host of a Slurm node list: "rack[1-2]gpu[003-005,9]-ib,x" -> "rack1gpu003-ib".

    Args:
        variable: the variable that has the list, for the message.

    Raises:
        UsageError: if the list cannot be read.
    """
    match = FIRST_HOST.match(nodes)
    if match is None:
        raise UsageError(f"{variable} = {nodes!r} cannot be read: set MASTER_ADDR to the host of the first task")
    return FIRST_NUMBER.sub(r"\1", match[1])


def local_world_size(env: Mapping[str, str]) -> int:
    """Returns the number of processes of the run on this node; 1 if the launcher does not say it."""
    tasks = re.match(r"\d+", env.get("LOCAL_WORLD_SIZE") or env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return int(tasks[0]) if tasks else 1


def launcher_has_store(env: Mapping[str, str]) -> bool:
    """Whether the launcher has the store of the run, as torchrun and ``internevo train`` do. Otherwise rank 0 has it."""
    return env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
