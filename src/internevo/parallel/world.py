"""Joining the processes of a run: under torchrun, under Slurm, or alone."""

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
"""Longest time that a collective of training may take, by default. The first ones wait for ranks that load, compile and
connect; a later one that waits for a rank which does not come is ended sooner, by ``train.watchdog``."""

LOST = re.compile(r"gloo/transport/|Operation timed out!|NCCL")
"""In the message of a collective that failed."""


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: dist.Store
    """Where the processes of the run find each other: keys and values that all of them can read and write."""


@dataclass(frozen=True)
class Place:
    """This process's place, as its launcher's environment says. ``address`` is None when it is alone."""

    rank: int
    size: int
    local_rank: int
    address: str | None


def find_place(env: Mapping[str, str], port: int = 8888, launcher: str | None = None) -> Place:
    """Reads torchrun's or Slurm's variables.

    Args:
        port: of the first host, under Slurm.
        launcher: "torch" or "slurm" insists on one of them.

    Raises:
        UsageError: when the launcher's variables are not there.
    """
    slurm = launcher == "slurm" or (launcher is None and "RANK" not in env and "SLURM_STEP_ID" in env)
    try:
        if slurm:
            host = env.get("MASTER_ADDR") or first_host(env["SLURM_JOB_NODELIST"])
            size = int(env.get("SLURM_NTASKS") or env["SLURM_NPROCS"])
            return Place(int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), f"tcp://{host}:{port}")
        if launcher == "torch" or "RANK" in env:
            return Place(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]), "env://")
    except KeyError as error:
        who = "srun" if slurm else "torchrun"
        raise UsageError(f"{error.args[0]} is not set: start this command with {who}, or leave out --launcher") from None
    return Place(0, 1, 0, None)


def first_host(nodes: str) -> str:
    """The first name of Slurm's node list: "gpu[003-005,9],x" -> "gpu003"."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    if match is None:
        raise UsageError(f"SLURM_JOB_NODELIST = {nodes!r} cannot be read")
    return match[1] + (match[2] or "")


def ranks_here(env: Mapping[str, str]) -> int:
    """Processes of the run on this machine, as far as its launcher says."""
    tasks = re.match(r"\d+", env.get("LOCAL_WORLD_SIZE") or env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return int(tasks[0]) if tasks else 1


@contextmanager
def join(port: int = 8888, launcher: str | None = None, timeout: timedelta = TIMEOUT) -> Iterator[World]:
    """Joins the run's process group, and leaves it at the end. NCCL on GPUs, gloo elsewhere.

    ``timeout``: longest time that a collective of training may take.

    After an error the groups stay: one whose collective is under way cannot be freed before that ends, and the other ranks may
    never come to it. Such a process must end without freeing anything, as ``cli.main`` ends it.
    """
    place = find_place(os.environ, port, launcher)
    device = pick_device(place.local_rank)
    on_cpu = gloo.register()
    if device.type == "cpu" and place.size > 1 and _is_local(os.environ):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = _store(place)
    dist.init_process_group(
        f"cpu:{on_cpu},cuda:nccl" if device.type == "cuda" else on_cpu,
        store=dist.PrefixStore("groups", store),
        rank=place.rank,
        world_size=place.size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield World(place.rank, place.size, place.local_rank, device, store)
    except Exception:
        if place.size == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _store(place: Place) -> dist.Store:
    if place.address is None:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous(place.address, place.rank, place.size, timeout=TIMEOUT))
    store.set_timeout(TIMEOUT)
    assert isinstance(store, dist.Store)
    return store


def lost_another(error: BaseException) -> bool:
    """Whether a collective has failed here because another rank is gone or does not come to it."""
    return isinstance(error, dist.DistError) or bool(LOST.search(str(error)))


def _is_local(env: Mapping[str, str]) -> bool:
    """Whether all processes are on this machine and have a loopback device to meet on."""
    return env.get("MASTER_ADDR") in ("127.0.0.1", "localhost") and any(n == "lo" for _, n in socket.if_nameindex())


def has_gpu() -> bool:
    """Whether runs use GPUs: there is one, and INTERNEVO_DEVICE is not "cpu"."""
    return os.environ.get("INTERNEVO_DEVICE") != "cpu" and torch.cuda.is_available()


def pick_device(local_rank: int) -> torch.device:
    """This process's GPU, or the CPU (also when INTERNEVO_DEVICE=cpu)."""
    if not has_gpu():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
