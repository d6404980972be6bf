"""The package's own names: ``import internevo`` is fast, and shows what it offers."""

import subprocess
import sys

import internevo


def test_the_package_lists_its_functions_without_importing_pytorch() -> None:
    code = "import sys, internevo; print(*dir(internevo)); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"load_model", "save_hf", "__version__"} <= set(done.stdout.split())


def test_everything_that_is_listed_is_there() -> None:
    assert all(hasattr(internevo, name) for name in dir(internevo))
    assert set(internevo.__all__) <= set(dir(internevo))
