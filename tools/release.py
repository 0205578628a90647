# SPDX-License-Identifier: Apache-2.0
"""The bundle as the MONAI model zoo wants it, in one zip: ``python -m tools.release``, or ``make release``.

The zip holds what git tracks of ``PARTS``, in a folder of the bundle's name, and has the same bytes whenever it is made
from the same commit. The zoo takes no file above ``LIMIT``: larger ones are laid beside the zip, to be uploaded, and
``large_files.yml`` says where from and with which checksum the zoo gets them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

from scripts import bundle_root
from scripts.utils.atomic_files import atomic_file, write_bytes

NAME = "sarcoma_ct_pet_mr_segmentation"
# As git's pathspecs. The reading order is about the repository: it leads through its readme and its tests.
PARTS = (
    *("configs", "docs", ":!docs/reading_order.md", "models", "scripts", "CHANGELOG.md", "LICENSE"),
    *("pyproject.toml", "requirements*.txt", ":!requirements-label.txt"),  # pip install ".[dicom]" works there
)
LIMIT = 25_000_000  # bytes of one file, by the zoo's CONTRIBUTING.md
Files = dict[str, bytes]


def _git(root: Path, *arguments: str) -> list[str]:
    """What git prints, split at its zeros."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        cause = " ".join((getattr(error, "stderr", None) or str(error)).split())
        raise ValueError(f"Git cannot say which files of {root} belong to a release ({cause}): use a clone.") from error
    return [line for line in done.stdout.split("\0") if line]


def checked_version(root: Path) -> str:
    """The version, where metadata, its changelog and the package agree on it.

    Args:
        root: the bundle's folder.

    Raises:
        ValueError: they do not, or it is no version.
    """
    path, package = root / "configs" / "metadata.json", root / "pyproject.toml"
    metadata = json.loads(path.read_text(encoding="utf-8"))
    version, newest = metadata["version"], next(iter(metadata["changelog"]), None)
    named = tomllib.loads(package.read_text(encoding="utf-8"))["project"]["version"]
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ValueError(f"{path} has the version {version}: write three numbers, such as 1.0.0.")
    if newest != version:
        raise ValueError(f"{path} is version {version}, but its changelog begins with {newest}: say there what is new.")
    if named != version:
        raise ValueError(f"{path} is version {version}, but {package} is {named}: make them equal.")
    return str(version)


def tracked_files(root: Path) -> Files:
    """Name -> content of every tracked file of ``PARTS``.

    Args:
        root: the bundle's folder, a checkout of git.

    Raises:
        ValueError: no checkout, or one with changes that are not committed.
    """
    changed = _git(root, "status", "--porcelain", "-z", "--untracked-files=all", "--", *PARTS)
    if changed:
        raise ValueError(
            f"{root / changed[0][3:]} differs from the last commit, and a release is made of a commit: "
            "commit or remove what `git status` lists."
        )
    files = {name: (root / name).read_bytes() for name in sorted(_git(root, "ls-files", "-z", "--", *PARTS))}
    if "configs/metadata.json" not in files:
        raise ValueError(f"Git tracks no configs/metadata.json in {root}: make the release in a clone of the bundle.")
    return files


def leave_out_large(files: Files, limit: int, url: str | None) -> tuple[Files, Files]:
    """Files for the zip, and those above the limit; ``large_files.yml`` in the zip says where the latter are.

    Args:
        files: name -> content.
        limit: bytes of one file.
        url: of the folder to which the large files are uploaded, each under its name in the bundle.

    Raises:
        ValueError: a file is above the limit, and there is no ``url``.
    """
    large = {name: data for name, data in files.items() if len(data) > limit}
    if not large:
        return files, {}
    if not url:
        raise ValueError(
            f"{', '.join(large)}: above the {limit} bytes that the model zoo takes of one file. Give --url, the "
            "address of the folder to which they are uploaded."
        )
    lines = ["large_files:"]
    for name, data in large.items():
        lines += [f'  - path: "{name}"', f'    url: "{url.rstrip("/")}/{name}"']
        lines += [f'    hash_val: "{hashlib.sha256(data).hexdigest()}"', '    hash_type: "sha256"']
    kept = {name: data for name, data in files.items() if name not in large}
    return {**kept, "large_files.yml": ("\n".join(lines) + "\n").encode()}, large


def write_zip(files: Files, path: Path) -> None:
    """Write the files into a folder of the bundle's name: names sorted, times and rights fixed.

    Args:
        files: name -> content.
        path: of the zip.
    """
    with atomic_file(path, check=_is_whole) as target, zipfile.ZipFile(target, "w") as archive:
        for name in sorted(files):
            member = zipfile.ZipInfo(f"{NAME}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
            member.create_system, member.external_attr = 3, 0o100644 << 16
            # Stored: what deflate makes of a file depends on the build of zlib.
            archive.writestr(member, files[name], zipfile.ZIP_STORED)


def _is_whole(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() is None


def release(root: Path, folder: Path, limit: int = LIMIT, url: str | None = None) -> Path:
    """Make the zip.

    Args:
        root: the bundle's folder, a checkout of git.
        folder: gets the zip, and the large files under ``upload``.
        limit: bytes of one file.
        url: see ``leave_out_large``.

    Returns:
        The zip's path.

    Raises:
        ValueError: the checkout is none, or not ready for a release.
    """
    version = checked_version(root)
    files, large = leave_out_large(tracked_files(root), limit, url)
    for name, data in large.items():
        write_bytes(data, folder / "upload" / name)
    path = folder / f"{NAME}_v{version}.zip"
    write_zip(files, path)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the zip and print its checksum; 1, and one sentence on stderr, where that cannot be."""
    parser = argparse.ArgumentParser(prog="python -m tools.release", description="Make the zip for the model zoo.")
    parser.add_argument("--output-dir", type=Path, default=Path(bundle_root()) / "runs" / "release")
    parser.add_argument("--url", help="folder to which files above the zoo's limit are uploaded")
    args = parser.parse_args(arguments)
    try:
        path = release(Path(bundle_root()), args.output_dir, url=args.url)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    data = path.read_bytes()
    print(f"{path}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
