"""Connects the processes of a run, which torchrun, Slurm or ``internevo train`` has started; or a single process alone."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ..errors import UsageError
from . import gloo

TIMEOUT = timedelta(minutes=30)
"""Default time-out of the collectives of training. The first ones wait for ranks that load, compile and connect. Later, the
watchdog (``train.watchdog``) ends a run sooner if a rank does not come to a collective."""

LOST_RANK = re.compile(r"gloo/transport/|Operation timed out!|NCCL")
"""Matches the messages of collectives that failed because of another rank."""


@dataclass(frozen=True)
class World:
    """This process in the world of a run."""

    rank: int
    size: int
    """Number of ranks."""
    local_rank: int
    """Number of this process on its node, from 0."""
    device: torch.device
    store: dist.Store
    """The key-value store that all ranks can read and write."""


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


def read_launcher(env: Mapping[str, str], port: int = 8888, launcher: str | None = None) -> LauncherInfo:
    """Reads the environment variables of torchrun or Slurm.

    Args:
        env: the environment.
        port: port of the first host, under Slurm.
        launcher: "torch" or "slurm"; None: whichever has set its variables.

    Raises:
        UsageError: if a variable of the launcher is missing.
    """
    slurm = launcher == "slurm" or (launcher is None and "RANK" not in env and "SLURM_STEP_ID" in env)
    try:
        if slurm:
            host = env.get("MASTER_ADDR") or first_host(env["SLURM_JOB_NODELIST"])
            size = int(env.get("SLURM_NTASKS") or env["SLURM_NPROCS"])
            return LauncherInfo(int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), f"tcp://{host}:{port}")
        if launcher == "torch" or "RANK" in env:
            return LauncherInfo(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]), "env://")
    except KeyError as error:
        command = "srun" if slurm else "torchrun"
        raise UsageError(f"{error.args[0]} is not set: start this command with {command}, or leave out --launcher") from None
    return LauncherInfo(0, 1, 0, None)


def first_host(nodes: str) -> str:
    """Returns the first host of a Slurm node list: "gpu[003-005,9],x" -> "gpu003".

    Raises:
        UsageError: if the list cannot be read.
    """
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    if match is None:
        raise UsageError(f"SLURM_JOB_NODELIST = {nodes!r} cannot be read")
    return match[1] + (match[2] or "")


def local_world_size(env: Mapping[str, str]) -> int:
    """Returns the number of processes of the run on this node; 1 if the launcher does not say it."""
    tasks = re.match(r"\d+", env.get("LOCAL_WORLD_SIZE") or env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return int(tasks[0]) if tasks else 1


@contextmanager
def join(port: int = 8888, launcher: str | None = None, timeout: timedelta = TIMEOUT) -> Iterator[World]:
    """Initializes ``torch.distributed`` with NCCL on GPUs and gloo on CPUs, and frees the process groups at the end.

    After an error, with several ranks, the process groups are not freed: a group cannot be freed before its collectives have
    ended, and those may wait forever for other ranks. The process must then end without freeing anything; ``cli.main`` does so.

    Args:
        port, launcher: as in ``read_launcher``.
        timeout: time-out of the collectives of training.
    """
    info = read_launcher(os.environ, port, launcher)
    device = pick_device(info.local_rank)
    on_cpu = gloo.register()
    if device.type == "cpu" and info.size > 1 and _is_local(os.environ):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = _store(info)
    dist.init_process_group(
        f"cpu:{on_cpu},cuda:nccl" if device.type == "cuda" else on_cpu,
        store=dist.PrefixStore("groups", store),
        rank=info.rank,
        world_size=info.size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield World(info.rank, info.size, info.local_rank, device, store)
    except Exception:
        if info.size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _store(info: LauncherInfo) -> dist.Store:
    if info.address is None:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous(info.address, info.rank, info.size, timeout=TIMEOUT))
    store.set_timeout(TIMEOUT)
    assert isinstance(store, dist.Store)
    return store


def is_lost_rank(error: BaseException) -> bool:
    """Whether the error is that of a collective that failed because another rank has ended or does not take part."""
    return isinstance(error, dist.DistError) or bool(LOST_RANK.search(str(error)))


def _is_local(env: Mapping[str, str]) -> bool:
    """Whether all processes are on this machine, and it has a loopback device."""
    return env.get("MASTER_ADDR") in ("127.0.0.1", "localhost") and any(n == "lo" for _, n in socket.if_nameindex())


def has_gpu() -> bool:
    """Whether runs use GPUs: there is a GPU, and INTERNEVO_DEVICE is not "cpu"."""
    return os.environ.get("INTERNEVO_DEVICE") != "cpu" and torch.cuda.is_available()


def pick_device(local_rank: int) -> torch.device:
    """Returns the GPU of this process and makes it the current one, or returns the CPU."""
    if not has_gpu():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
