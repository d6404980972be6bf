"""Processes that stay: a test's training run joins some of them, without starting Python and importing PyTorch anew."""

import atexit
import faulthandler
import multiprocessing
import os
import socket
import traceback
from pathlib import Path

DEVICE = os.environ.get("INTERNEVO_TEST_DEVICE", "cpu")
"""Where the runs train: "cuda" for GPUs, as many or as few as there are."""


def _work(rank, pipe):
    os.environ.update(place(rank, 1, 0), INTERNEVO_PARENT=str(os.getppid()))
    import torch

    from internevo.commands.train import train

    faulthandler.enable()  # a crash shows where

    torch.set_num_threads(1)
    while (job := pipe.recv()) is not None:
        path, overrides, size, port = job
        os.environ.update(place(rank, size, port))
        try:
            train(Path(path), overrides, None, launcher="torch")
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def place(rank, size, port):
    """The variables of a launcher, for one process on this machine."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "INTERNEVO_DEVICE": DEVICE, **shared_gpu(rank),
    }  # fmt: skip


def shared_gpu(rank):
    """NCCL refuses two ranks of one host on one GPU; as ranks of several hosts they meet over sockets."""
    if DEVICE == "cpu":
        return {}
    import torch

    return {"NCCL_HOSTID": str(rank), "NCCL_SOCKET_IFNAME": "lo"} if torch.cuda.device_count() == 1 else {}


class Pool:
    """Processes, started when first needed."""

    def __init__(self):
        self.workers = []
        atexit.register(self.stop)

    def train(self, path, processes=1, *overrides, timeout=400):
        """``internevo train PATH OVERRIDES`` on so many processes; fails with the traceback of the first rank that failed."""
        context = multiprocessing.get_context("spawn")
        while len(self.workers) < processes:
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(len(self.workers), theirs), daemon=True)
            process.start()
            self.workers.append((process, mine))
        port = free_port()
        for _, pipe in self.workers[:processes]:
            pipe.send((str(path), list(overrides), processes, port))
        failures = []
        for rank, (process, pipe) in enumerate(self.workers[:processes]):
            if not pipe.poll(5 if failures else timeout):
                failures.append(f"rank {rank} did not finish")
            else:
                try:
                    error = pipe.recv()
                except EOFError:
                    error = f"the process ended with exit code {process.exitcode}"
                failures += [f"rank {rank}:\n{error}"] if error else []
        if failures:
            self.stop()
            raise AssertionError("\n\n".join(failures))

    def stop(self, patience=0):
        """Ends the workers; with ``patience`` seconds for them to end by themselves, and coverage to be written."""
        for process, pipe in self.workers:
            if patience and process.is_alive():
                pipe.send(None)
        for process, _ in self.workers:
            process.join(patience)
            process.kill()
        self.workers = []
