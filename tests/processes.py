"""What runs below a process."""

import subprocess
from pathlib import Path


def processes_below(parent: int) -> list[int]:
    """The processes that a process has started, and those that they have started."""
    found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found] + [below for child in found for below in processes_below(int(child))]


def is_alive(process: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def rank_of(process: int) -> int | None:
    """The rank of a process that a launcher has started, if it is one."""
    try:
        variables = Path(f"/proc/{process}/environ").read_text().split("\0")
    except OSError:
        return None
    return next((int(v.removeprefix("RANK=")) for v in variables if v.startswith("RANK=")), None)
