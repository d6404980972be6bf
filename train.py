"""InternEvo's own command line; the same as ``internevo train``."""

from internevo.cli import train_py

if __name__ == "__main__":
    train_py()
