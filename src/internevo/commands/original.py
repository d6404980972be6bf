"""InternEvo's own command line: ``train.py --config CONFIG [--launcher slurm|torch] [--port P] [--seed S] ...``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import PROFILING


def parse() -> argparse.Namespace:
    """Parses the command line of this process."""
    parser = argparse.ArgumentParser(
        description="Train. The same as `internevo train`.",
        epilog="Example: torchrun --nproc-per-node 8 --shutdown-timeout 600 train.py --config configs/7B_internlm2.py",
    )
    parser.add_argument("--config", type=Path, required=True, help="config file")
    parser.add_argument(
        "--launcher", choices=("slurm", "torch"), help="what started the processes (default: found from the environment)"
    )
    parser.add_argument(
        "--port", type=int, help="port of the first host, under Slurm (default: MASTER_PORT, or one for each job)"
    )
    parser.add_argument("--seed", type=int, help="seed of the initial weights")
    parser.add_argument("--profiling", action="store_true", help=f"the same as {' '.join(PROFILING)}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE", help="overrides of config keys")
    return parser.parse_args()
