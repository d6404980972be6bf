"""Makes the config reference from the schema whenever the documentation is built."""

from pathlib import Path
from typing import Any

from internevo.config.reference import write


def on_pre_build(config: Any) -> None:
    """Writes docs/reference/config.md."""
    write(Path(config["docs_dir"]) / "reference" / "config.md")
