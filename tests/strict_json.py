"""A reader that takes what the standard takes (https://www.rfc-editor.org/rfc/rfc8259), and no NaN as Python's does."""

import json
from typing import Any


def strict(text: str) -> Any:
    """The value of a JSON text."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)
