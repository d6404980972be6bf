"""Makes the pictures of the console and of reports: ``make pictures``. It needs the demo's data (``make demo``) and Chromium.

The commands run on a terminal of 80 columns, which is drawn; Chromium draws the reports, as on a screen and on a phone.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import shlex
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS, ROWS = 80, 24
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLOURS = {"brown": "yellow"}
"""pyte's names of colours -> rich's, where they differ."""


class Recorder:
    """A terminal on which a command runs."""

    def __init__(self) -> None:
        import pyte

        self.screen = pyte.HistoryScreen(COLUMNS, ROWS, history=10_000)
        self.stream = pyte.ByteStream(self.screen)

    def run(self, command: list[str], after: Callable[[list[Text]], bool] = lambda lines: True) -> None:
        """Runs a command. ``after`` is called with all lines whenever something is printed, until it returns True."""
        print(f"$ {shlex.join(command)}", flush=True)
        self.stream.feed(f"$ internevo {shlex.join(command)}\r\n".encode())
        process, terminal = pty.fork()
        if process == 0:
            os.environ["TERM"] = "xterm-256color"
            os.execv(sys.executable, [sys.executable, "-m", "internevo", *command])
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        seen = False
        while data := _read(terminal):
            self.stream.feed(data)
            seen = seen or after(self.lines())
        if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
            raise SystemExit("\n".join(line.plain for line in self.lines()))

    def lines(self) -> list[Text]:
        """Returns everything that was printed, as lines with their styles."""
        rows = [*self.screen.history.top, *(self.screen.buffer[number] for number in range(ROWS))]
        lines = []
        for row in rows:
            line = Text()
            for column in range(COLUMNS):
                cell = row[column]
                colour = "" if cell.fg == "default" else COLOURS.get(cell.fg, f"#{cell.fg}" if len(cell.fg) == 6 else cell.fg)
                line.append(cell.data, f"{'bold ' * cell.bold}{colour}".strip() or None)
            line.rstrip()
            lines.append(line)
        while lines and not lines[-1].plain:
            lines.pop()
        return lines


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the command has ended
        return b""


def draw(lines: list[Text], path: Path, title: str) -> None:
    """Writes lines as a picture of a terminal."""
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)
    for line in lines:
        console.print(line, no_wrap=True, overflow="crop")
    path.write_text(console.export_svg(title=title) + "\n", encoding="utf-8")


def photograph(page: Path, picture: Path, width: int, height: int) -> None:
    """Lets Chromium draw a page."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit("Chromium is not installed; on Debian: apt install chromium")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000"]
    shot = [browser, *options, f"--window-size={width},{height}", f"--screenshot={picture}", page.resolve().as_uri()]
    subprocess.run(shot, check=True, capture_output=True)


def is_half_done(lines: list[Text]) -> bool:
    """Whether the bar below the lines is past half, and tells the time left."""
    percent = lines[-1].plain.partition("%")[0].split()[-1:] if lines and lines[-1].plain.endswith(" left") else []
    return bool(percent) and percent[0].isdigit() and int(percent[0]) >= 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/pictures"), help="new folder for the runs")
    parser.add_argument("--steps", type=int, default=400, help="steps of a run")
    parser.add_argument("--nproc", type=int, default=2, help="processes of a run")
    parser.add_argument("--fp32", action="store_true", help="for CPUs without instructions for bfloat16")
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE", help="more overrides, for a smaller model, say")
    parser.add_argument("--images", type=Path, default=Path("docs/images"), help="folder for the pictures")
    a = parser.parse_args()
    if not Path("demo/data/tokenizer.json").is_file():
        raise SystemExit("the demo's data is missing: run make demo first")
    if a.folder.exists():
        raise SystemExit(f"{a.folder} exists: remove it, or give another --folder")
    runs = [a.folder / name for name in ("demo", "smaller-lr")]
    for run, lr in zip(runs, ("3e-3", "3e-4"), strict=True):
        terminal = Recorder()
        every = max(1, a.steps // 4)
        command = [
            "train", "configs/demo.py", f"data.total_steps={a.steps}", f"data.valid_every={every}",
            f"ckpt.checkpoint_every={every}", f"monitor.sample_every={every}",
            f"adam.lr={lr}", f"ckpt.save_ckpt_folder={run}", f"JOB_NAME={run.name}",
            *(["model.dtype=torch.float32"] if a.fp32 else []), *a.overrides, "--nproc", str(a.nproc),
        ]  # fmt: skip

        def while_training(lines: list[Text]) -> bool:
            if half := is_half_done(lines):
                draw(lines[-ROWS:], a.images / "console-training.svg", "internevo train")
            return half

        terminal.run(command, while_training if run is runs[0] else lambda lines: True)
        if run is runs[0]:
            draw(terminal.lines()[-18:], a.images / "console-end.svg", "internevo train")
    comparison = a.folder / "comparison.html"
    subprocess.run([sys.executable, "-m", "internevo", "report", *map(str, runs), "--output", str(comparison)], check=True)
    photograph(runs[0] / "report.html", a.images / "report.png", 1280, 1500)
    photograph(runs[0] / "report.html", a.images / "report-phone.png", 500, 1100)
    photograph(comparison, a.images / "report-comparison.png", 1280, 1000)


if __name__ == "__main__":
    main()
