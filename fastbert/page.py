"""One HTML file that needs no network: a page of this package with its data inside."""

import json
from pathlib import Path
from typing import Any


def with_data(template: Path, data: Any) -> str:
    """The page as HTML: the template, whose script says `const data = __DATA__;`, with `data` as JSON in that place.

    Raises:
        ValueError: `data` holds NaN or an infinity, which JSON does not have.
    """
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # a text may hold "</script>"
    return template.read_text(encoding="utf-8").replace("__DATA__", text)
