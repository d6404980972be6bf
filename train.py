"""InternEvo's own command line; the same as ``internevo train``."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:  # a random.py next to this file must not replace Python's own module
        sys.path.append(sys.path.pop(0))
    from internevo.cli import train_py

    train_py()
