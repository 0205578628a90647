# SPDX-License-Identifier: Apache-2.0
"""What a report loads of a case, whether it lies in the page or in the folder beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote


def case_part(page: Path, number: int = 0, kind: str = "") -> dict[str, Any]:
    """The part ``case<number><kind>`` of a report, such as ``case0-volumes``."""
    name, text = f"case{number}{kind}", page.read_text(encoding="utf-8")
    if embedded := re.search(rf'<script type="application/json" id="part-{name}">(.*?)</script>', text):
        return json.loads(embedded[1])  # type: ignore[no-any-return]
    address = re.search(rf'"([^"]*/{name}_[0-9a-f]+\.js)"', text)
    assert address, f"{page} has no {name}"
    call = (page.parent / unquote(address[1])).read_text(encoding="utf-8")
    return json.loads(call[len(f'addReportPart("{name}", ') : -len(");\n")])  # type: ignore[no-any-return]


def case_html(page: Path, number: int = 0) -> str:
    """The HTML of a case."""
    return str(case_part(page, number)["html"])
