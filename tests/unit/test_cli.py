"""How the command line ends a process."""

import subprocess
import sys

import pytest

END = """
import atexit, sys
import {module}
from internevo import cli
atexit.register(print, "Python was shut down")
print("the last line", end="")
cli._exit(3)
"""


@pytest.mark.parametrize(("module", "rest"), [("internevo.parallel.world", ""), ("internevo.config", "Python was shut down\n")])
def test_a_rank_ends_without_shutting_python_down(module: str, rest: str) -> None:
    """Threads of process groups may still need Python then. Nothing that was printed is lost."""
    done = subprocess.run([sys.executable, "-c", END.format(module=module)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, f"the last line{rest}")
