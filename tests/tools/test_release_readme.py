# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from tools.release_readme import FRONT_MATTER, release_readme

RELEASED = ["docs/card.md", "docs/a.png", "LICENSE"]
REPOSITORY = "https://github.com/OWNER/NAME"


@pytest.mark.parametrize(
    ("text", "without", "address"),
    [
        ("[card](docs/card.md#top)", "[card](docs/card.md#top)", f"[card]({REPOSITORY}/blob/c0ffee/docs/card.md#top)"),
        ("[a\nb](docs/how/b.md)", "a\nb", f"[a\nb]({REPOSITORY}/blob/c0ffee/docs/how/b.md)"),
        ("[docs](docs/)", "[docs](docs/)", f"[docs]({REPOSITORY}/blob/c0ffee/docs)"),
        ("![A](docs/a.png)", "![A](docs/a.png)", f"![A]({REPOSITORY}/raw/c0ffee/docs/a.png)"),
        ('<img src="docs/a.png">', '<img src="docs/a.png">', f'<img src="{REPOSITORY}/raw/c0ffee/docs/a.png">'),
        (
            "[web](https://monai.io) [up](#use)",
            "[web](https://monai.io) [up](#use)",
            "[web](https://monai.io) [up](#use)",
        ),
        (
            "[![A](docs/a.png)](LICENSE)",
            "[![A](docs/a.png)](LICENSE)",
            f"[![A]({REPOSITORY}/raw/c0ffee/docs/a.png)]({REPOSITORY}/blob/c0ffee/LICENSE)",
        ),
    ],
)
def test_links_lead_to_the_repository_or_into_the_release(text: str, without: str, address: str) -> None:
    page = f"# Title\n\n{text}\n"
    assert release_readme(page, RELEASED, None, "c0ffee").endswith(f"\n\n{without}\n")
    assert release_readme(page, RELEASED, f"{REPOSITORY}/", "c0ffee").endswith(f"\n\n{address}\n")


def test_the_page_starts_with_the_front_matter_and_the_title() -> None:
    page = release_readme("# Title\n\nText\n", [], REPOSITORY, "c0ffee")
    assert page.startswith(f"{FRONT_MATTER}# Title\n\n> This is the released bundle.")
    assert f"a [clone of the repository]({REPOSITORY})" in page
