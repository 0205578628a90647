# SPDX-License-Identifier: Apache-2.0
"""What the page loads only when a reader asks for it: cases, their volumes, the viewer.

They lie in a folder beside the page, ``<page>_files``, or inside the page. A file's name holds a hash of its content,
so that an old page never loads a file of a new one; files of earlier pages are removed when the new page is written.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from scripts.utils.atomic_files import write_text

_FILE = re.compile(r"(case\d+|case\d+-volumes|viewer)_[0-9a-f]{12}\.js")


class PageParts:
    """Parts of one page by name.

    Args:
        page: the HTML file; None keeps the parts for the text of the page itself.
    """

    def __init__(self, page: Path | None) -> None:
        self.folder = page.with_name(f"{page.stem}_files") if page else None
        self.files: dict[str, str] = {}  # name -> address, relative to the page
        self.embedded: dict[str, Markup] = {}  # name -> JSON that is safe inside of a script element
        self.viewer: Markup | None = None
        self.script_hashes: list[str] = []

    def add(self, name: str, value: Mapping[str, Any]) -> None:
        """Keep a part."""
        text = json.dumps(value, ensure_ascii=True, allow_nan=False)
        for character in "<>&":  # as in jinja2's filter tojson; in JSON they only occur in strings
            text = text.replace(character, f"\\u{ord(character):04x}")
        if self.folder:
            self._write(name, f'addReportPart("{name}", {text});\n')
        else:
            self.embedded[name] = Markup(text)

    def add_viewer(self, library: str) -> None:
        """Keep the viewer's library, a classic script."""
        if self.folder:
            self._write("viewer", library)
        else:
            # The only sequences that could end or confuse the script element; both occur in strings and comments only.
            library = re.sub(r"</(?=script)", r"<\\/", library, flags=re.IGNORECASE).replace("<!--", r"<\!--")
            self.viewer = Markup(library)
            self.script_hashes.append(script_hash(library))

    def remove_old_files(self) -> None:
        """Remove files of earlier pages of this name."""
        if not self.folder or not self.folder.is_dir():
            return
        current = {Path(address).name for address in self.files.values()}
        for path in self.folder.iterdir():
            if _FILE.fullmatch(path.name) and path.name not in current:
                path.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _write(self, name: str, text: str) -> None:
        assert self.folder
        path = self.folder / f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:12]}.js"
        if not path.is_file():
            write_text(text, path)
        self.files[name] = f"{self.folder.name}/{path.name}"


def script_hash(script: str) -> str:
    """The source of a script for a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
