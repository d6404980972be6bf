"""``python -m internevo`` is the same as ``internevo``."""

from .cli import main

main()
