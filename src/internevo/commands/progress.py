"""The progress bar of commands that read or write many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextmanager
def progress_bar(text: str) -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    """Shows a bar, from the first progress on, so that there is none if a command fails before it has begun.

    Yields:
        A function to call with the bytes that are done and all bytes, and a function that prints a line of text above the bar.
    """
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn(text), *columns)
    task = bar.add_task(text, total=None)

    def update(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    def say(line: str) -> None:
        bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    try:
        yield update, say
    finally:
        if bar.live.is_started:
            bar.stop()
