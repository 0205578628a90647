# SPDX-License-Identifier: Apache-2.0
"""Make the zip of the bundle for the MONAI model zoo: ``python -m tools.release``, or ``make release``.

The zip is a ``git archive`` of ``PARTS``, in a folder with the bundle's name. The same commit always gives the same
bytes. The zoo accepts no file above ``LIMIT``: larger files are written to a folder beside the zip, to be uploaded, and
``large_files.yml`` in the zip has their addresses and checksums.

The zip's ``README.md`` is made from the repository's (``release_readme``). ``model_zoo/`` beside the zip has the files
that a pull request adds to the zoo's repository besides the bundle: tests, and the properties that apps need.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from scripts import bundle_root
from scripts.utils.atomic_files import write_bytes
from scripts.utils.checksums import sha256
from tools.release_readme import release_readme

NAME = "sarcoma_ct_pet_mr_segmentation"
# Pathspecs of git. All other folders (benchmarks, examples, monai_label, tests, tools) are only in the repository.
PARTS = (
    "configs",
    ":(exclude)configs/benchmark",  # needs benchmarks/
    "docs",
    ":(exclude)docs/reading_order.md",  # describes the repository
    "models",
    "scripts",
    "CHANGELOG.md",
    "LICENSE",
    "SECURITY.md",
    # For ``pip install -e ".[dicom]"`` in the unpacked bundle.
    "pyproject.toml",
    "requirements*.txt",
    ":(exclude)requirements-label.txt",  # for the environment of MONAI Label, which monai_label/ needs
)
README = "README.md"
CITATION = "CITATION.cff"
ZOO_FILES = "tools/model_zoo"  # laid out as in the zoo's repository
LIMIT = 25_000_000  # bytes of one file, from the zoo's CONTRIBUTING.md


def _git(root: Path, *arguments: str) -> bytes:
    """Run git in a folder and return its output.

    Raises:
        ValueError: git failed or is not installed.
    """
    # git archive writes the time of the commit in the local time zone.
    environment = {**os.environ, "TZ": "UTC"}
    try:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, check=True, env=environment
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", None)
        cause = " ".join((output.decode(errors="replace") if output else str(error)).split())
        raise ValueError(f"git failed in {root}: {cause}. Make the release in a clone of the repository.") from error


def _git_names(root: Path, *arguments: str) -> list[str]:
    """Run a git command with ``-z`` in a folder and return the names that it prints."""
    return [name for name in _git(root, *arguments).decode().split("\0") if name]


def checked_version(root: Path) -> str:
    """The version of the bundle.

    Args:
        root: folder of the bundle.

    Raises:
        ValueError: the version is not three numbers, or the metadata, its changelog, the package and the citation
            disagree.
    """
    path, package = root / "configs" / "metadata.json", root / "pyproject.toml"
    metadata = json.loads(path.read_text(encoding="utf-8"))
    version, newest = str(metadata["version"]), next(iter(metadata["changelog"]), None)
    package_version = tomllib.loads(package.read_text(encoding="utf-8"))["project"]["version"]
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ValueError(f"The version {version} in {path} is not three numbers, such as 1.0.0.")
    if newest != version:
        raise ValueError(
            f"{path} has version {version}, but its changelog starts with {newest}. Add an entry for {version}."
        )
    citation = root / CITATION
    if citation.is_file() and f"\nversion: {version}\n" not in citation.read_text(encoding="utf-8"):
        raise ValueError(f"{path} has version {version}, but {citation} has another. Make them equal.")
    if package_version != version:
        raise ValueError(f"{path} has version {version}, but {package} has {package_version}. Make them equal.")
    return version


def require_clean(root: Path) -> None:
    """Raise ValueError if a file that a release is made of differs from the last commit.

    Args:
        root: folder of the bundle, a clone of the repository.
    """
    changes = _git_names(root, "status", "--porcelain", "-z", "--untracked-files=all", "--", *PARTS, README, ZOO_FILES)
    if changes:
        raise ValueError(
            f"{root / changes[0][3:]} differs from the last commit, but a release is made from a commit. "
            "Commit or remove the files that `git status` lists."
        )


def repository_address(root: Path) -> str | None:
    """The web address of the repository from ``CITATION.cff`` (``repository-code``); None if it names none.

    Args:
        root: folder of the bundle.
    """
    path = root / CITATION
    found = (
        re.search(r"^repository-code: *[\"']?(https?://[^\s\"']+)", path.read_text("utf-8"), re.MULTILINE)
        if path.is_file()
        else None
    )
    return found[1] if found else None


def large_files_list(root: Path, names: Sequence[str], url: str) -> str:
    """The content of ``large_files.yml``, from which the zoo downloads files.

    Args:
        root: folder of the bundle.
        names: paths of the files in the bundle.
        url: address of the folder to which the files are uploaded, each under its path in the bundle.
    """
    lines = ["large_files:"]
    for name in names:
        lines += [f'  - path: "{name}"', f'    url: "{url.rstrip("/")}/{name}"']
        lines += [f'    hash_val: "{sha256(root / name)}"', '    hash_type: "sha256"']
    return "\n".join(lines) + "\n"


def release(
    root: Path, folder: Path, limit: int = LIMIT, url: str | None = None, repository: str | None = None
) -> Path:
    """Make the zip.

    Args:
        root: folder of the bundle, a clone of the repository.
        folder: output folder of the zip. Files above the limit are written to its sub folder ``upload``, files for the
            zoo's repository to ``model_zoo``.
        limit: maximal size of one file in bytes.
        url: address of the folder to which files above the limit are uploaded.
        repository: web address of the repository, for the links in the README; by default that of ``CITATION.cff``.

    Returns:
        The path of the zip.

    Raises:
        ValueError: the versions disagree, there are uncommitted changes, there is no clone, or a file is above the
            limit and there is no ``url``.
    """
    version = checked_version(root)
    require_clean(root)
    names = _git_names(root, "ls-files", "-z", "--", *PARTS)
    large = [name for name in names if (root / name).stat().st_size > limit]
    if large and not url:
        raise ValueError(
            f"{', '.join(large)}: larger than {limit} bytes, the zoo's limit for one file. Give the address of the "
            "folder to which such files are uploaded by --url."
        )
    excluded = [f":(exclude,literal){name}" for name in large]
    commit = _git(root, "rev-parse", "HEAD").decode().strip()
    readme = (root / README).read_text(encoding="utf-8")
    added = {README: release_readme(readme, names, repository or repository_address(root), commit)}
    if large and url:
        added["large_files.yml"] = large_files_list(root, large, url)
    virtual = [f"--add-virtual-file={NAME}/{name}:{text}" for name, text in added.items()]
    # Level 0: the result of compression depends on the version of zlib.
    options = ("--format=zip", "-0", f"--prefix={NAME}/", *virtual)
    data = _git(root, "-c", "core.autocrlf=false", "archive", *options, "HEAD", "--", *PARTS, *excluded)
    for name in large:
        target = folder / "upload" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, target)
    for name in _git_names(root, "ls-files", "-z", "--", ZOO_FILES):
        write_bytes((root / name).read_bytes(), folder / "model_zoo" / Path(name).relative_to(ZOO_FILES))
    path = folder / f"{NAME}_v{version}.zip"
    write_bytes(data, path)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the zip and print its checksum.

    Returns:
        0, or 1 after an error, which is printed to stderr in one line.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.release", description="Make the zip for the model zoo.")
    parser.add_argument("--output-dir", type=Path, default=Path(bundle_root()) / "runs" / "release")
    parser.add_argument("--url", help="address of the folder to which files above the zoo's limit are uploaded")
    parser.add_argument("--repository", metavar="URL", help="web address of the repository (default: CITATION.cff's)")
    args = parser.parse_args(arguments)
    try:
        path = release(Path(bundle_root()), args.output_dir, url=args.url, repository=args.repository)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    data = path.read_bytes()
    print(f"{path}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
