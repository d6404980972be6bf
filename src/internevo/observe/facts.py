"""Facts about the process that trains, for the report: hardware, versions, the commit of the source, the command."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .. import __version__

COMMAND = "INTERNEVO_COMMAND"
"""Environment variable with the command line of the process that has started the ranks."""


def facts(device: torch.device) -> dict[str, Any]:
    """Returns the facts about this process and its machine."""
    return {
        "device": device_name(device),
        "host": platform.node(),
        "versions": {"internevo": __version__, "torch": torch.__version__, "python": platform.python_version()}
        | ({"cuda": torch.version.cuda} if device.type == "cuda" else {}),
        "commit": commit(Path(__file__).parent),
        "command": os.environ.get(COMMAND) or command(),
    }


def command() -> str:
    """Returns the command line of this process, as it is typed."""
    program = Path(sys.argv[0]).name
    name = "internevo" if program in ("internevo", "__main__.py") else f"python {sys.argv[0]}"
    return " ".join([name, shlex.join(sys.argv[1:])])


def device_name(device: torch.device) -> str:
    """Returns the name of the GPU, or of the processor with the number of cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return f"{found[1] if found else platform.processor() or platform.machine()}, {cores} cores"


def commit(folder: Path) -> str | None:
    """Returns the commit of the Git repository that a folder is in, marked if files have changed since; None without one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
