"""Makes the config reference from the schema and a page of the notebook, and checks each page, whenever the documentation is
built."""

import json
import logging
from pathlib import Path
from typing import Any

from internevo.config.reference import write

log = logging.getLogger("mkdocs.hooks")


def on_pre_build(config: Any) -> None:
    """Writes docs/reference/config.md and docs/reference/notebook.md."""
    docs = Path(config["docs_dir"])
    write(docs / "reference" / "config.md")
    (docs / "reference" / "notebook.md").write_text(notebook_page(docs / "notebook.ipynb"), encoding="utf-8")


def notebook_page(path: Path) -> str:
    """Returns a notebook as Markdown."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join([*parts, f"(The notebook: [{path.name}](../{path.name}))"]) + "\n"


def on_page_content(html: str, page: Any, **_: Any) -> None:
    """Warns of a bar escaped for a table that is shown with its backslash, as in code; `mkdocs build --strict` fails then."""
    if r"\|" in html:
        log.warning(r"%s shows \|: write <code>a&#124;b</code> in a table", page.file.src_uri)
