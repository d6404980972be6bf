"""``internevo report``: writes the report of a run again, or a page that compares several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from ..observe.report import write_comparison, write_report


def write(runs: Sequence[Path], output: Path | None) -> Path:
    """Writes the page, and returns its path.

    Args:
        output: the file for a comparison; None: comparison.html.

    Raises:
        UsageError: if a folder is not a run's, the file is somebody else's, or ``output`` is given with a single run.
    """
    for run in runs:
        if not (run / "metrics.jsonl").is_file():
            raise UsageError(f"{run} {'is not a run folder: it has no metrics.jsonl' if run.exists() else 'does not exist'}")
    if len(runs) > 1:
        return write_comparison(runs, output or Path("comparison.html"))
    if output is not None:
        raise UsageError("--output is for a comparison of several runs; the report of one run is in its run folder")
    return write_report(runs[0])
