# SPDX-License-Identifier: Apache-2.0
"""The README of a release, made from the repository's: front matter for Hugging Face, and links that lead somewhere."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection

FRONT_MATTER = """---
license: apache-2.0
library_name: monai
pipeline_tag: image-segmentation
tags:
- monai
- medical
- segmentation
- knowledge-distillation
- ct
- pet
- mri
---

"""
NOTE = "> This is the released bundle. Commands with `make`, `python -m benchmarks` or Snakemake need {clone}.\n\n"
# [text](target) and ![text](target); a text may hold one picture. src="target" of HTML.
LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\((?P<target>[^)\s]+)\)")
SOURCE = re.compile(r'src="(?P<target>[^"]+)"')


def release_readme(text: str, released: Collection[str], repository: str | None, commit: str) -> str:
    """The README of a release.

    With the repository's address every relative link becomes absolute, at this commit. Without it, links to files of
    the release stay relative, and of all others only the text stays.

    Args:
        text: the repository's README, whose first line is its title.
        released: the files of the release.
        repository: the web address of the repository, such as https://github.com/OWNER/NAME.
        commit: of the release.
    """

    def address(target: str, kind: str) -> str | None:
        path, hash_sign, anchor = target.partition("#")
        if not path or "://" in path:
            return target
        if repository:
            return f"{repository.rstrip('/')}/{kind}/{commit}/{posixpath.normpath(path)}{hash_sign}{anchor}"
        within = posixpath.normpath(path)
        return target if any(name == within or name.startswith(f"{within}/") for name in released) else None

    def link(match: re.Match[str]) -> str:
        image, target = match["image"], address(match["target"], "raw" if match["image"] else "blob")
        label = LINK.sub(link, match["text"])
        return f"{image}[{label}]({target})" if target else label

    def source(match: re.Match[str]) -> str:
        return f'src="{address(match["target"], "raw") or match["target"]}"'

    title, _, body = text.partition("\n\n")
    clone = f"a [clone of the repository]({repository})" if repository else "a clone of the repository"
    return FRONT_MATTER + f"{title}\n\n" + NOTE.format(clone=clone) + SOURCE.sub(source, LINK.sub(link, body))
