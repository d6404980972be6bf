"""``python -m internevo`` is the same as ``internevo``."""

import os
import sys

SOURCE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The folder with this package."""

# With -m, Python searches the current folder first. A user's random.py there must not replace Python's own module.
if not sys.flags.safe_path:
    if sys.path[0] != SOURCE:
        del sys.path[0]
    else:  # the processes that this one starts find the package as well
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [SOURCE, os.environ.get("PYTHONPATH")]))

from .cli import main  # noqa: E402

main()
