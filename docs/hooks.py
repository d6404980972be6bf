"""Makes the config reference from the schema, and checks each page, whenever the documentation is built."""

import logging
from pathlib import Path
from typing import Any

from internevo.config.reference import write

log = logging.getLogger("mkdocs.hooks")


def on_pre_build(config: Any) -> None:
    """Writes docs/reference/config.md."""
    write(Path(config["docs_dir"]) / "reference" / "config.md")


def on_page_content(html: str, page: Any, **_: Any) -> None:
    """Warns of a bar escaped for a table that is shown with its backslash, as in code; `mkdocs build --strict` fails then."""
    if r"\|" in html:
        log.warning(r"%s shows \|: write <code>a&#124;b</code> in a table", page.file.src_uri)
