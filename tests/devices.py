"""Where tests run: on the CPU, or with ``INTERNEVO_TEST_DEVICE=cuda`` on GPUs, as many or as few as there are."""

import os

DEVICE = os.environ.get("INTERNEVO_TEST_DEVICE", "cpu")


def variables(rank=0):
    """Of the environment of a run's process."""
    found = {"OMP_NUM_THREADS": "1", "INTERNEVO_DEVICE": DEVICE}
    if DEVICE == "cuda":
        import torch

        if torch.cuda.device_count() == 1:
            # NCCL refuses two ranks of one host on one GPU; as ranks of several hosts they meet over sockets.
            found |= {"NCCL_HOSTID": str(rank), "NCCL_SOCKET_IFNAME": "lo"}
    return found
