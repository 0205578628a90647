# SPDX-License-Identifier: Apache-2.0
"""One run at a time on one output."""

from __future__ import annotations

import atexit
import json
import logging
import os
import platform
import time
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from scripts.utils.atomic_files import write_json

logger = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds that a killed run's own processes may take to notice its end
_held: dict[Path, tuple[FileLock, Path]] = {}


def hold(path: str | Path) -> None:
    """Take an output for this process until it ends or calls ``release``; the operating system frees it in any case.

    What a killed run left is taken over, with a word in the log, and its half-written ``.part`` files are removed.

    Args:
        path: folder of a run's output, or the one mask (.nii.gz) that it writes.

    Raises:
        ValueError: another process holds it; it is named.
        OSError: its folder takes no files.
    """
    target = Path(path).absolute()
    if target in _held:
        return
    single = target.name.endswith(".nii.gz")
    folder = target.parent if single else target
    folder.mkdir(parents=True, exist_ok=True)
    stem = f".{target.name}" if single else ""
    owner = folder / f"{stem}.run.json"
    lock = FileLock(folder / f"{stem}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        _require_files(target, lock.lock_file)
        found = _owner(owner)
        if _alive(found):
            raise ValueError(_busy(target, found)) from None
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise ValueError(_busy(target, found)) from None
    before = _owner(owner)
    if before and before.get("pid") != os.getpid():
        logger.warning("%s was left by process %s, which has ended: taken over", target, before.get("pid"))
        own = folder.glob(f".{target.name}.*.part" if single else ".*.part")
        below = () if single else folder.rglob(f".*.{before.get('pid')}.part")  # as masks; other runs may go on there
        for leftover in [*own, *below]:
            leftover.unlink(missing_ok=True)
    write_json({"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%F %T")}, owner)
    _held[target] = lock, owner
    atexit.register(release, os.getpid())


def _require_files(target: Path, lock: str) -> None:
    """filelock takes a folder where no file can be made, as /proc, for a lock that somebody holds."""
    try:
        os.close(os.open(lock, os.O_RDWR | os.O_CREAT, 0o644))
    except OSError as error:
        what = f"{target} cannot be written, since its folder takes no files ({error.strerror}): name another output."
        raise OSError(error.errno, what) from error


def release(pid: int | None = None) -> None:
    """Let go of everything that this process holds.

    Args:
        pid: of the process that took it, where one that it forked may come here as well.
    """
    while _held and pid in (None, os.getpid()):
        _, (lock, owner) = _held.popitem()
        owner.unlink(missing_ok=True)
        lock.release()


def _owner(path: Path) -> dict[str, Any]:
    """Who says to hold it; nothing where there is nobody, or the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    named = isinstance(found, dict) and {"host", "since"} <= set(found) and isinstance(found.get("pid"), int)
    return found if named else {}


def _alive(owner: dict[str, Any]) -> bool:
    """Whether the process that took it is still there, as far as that can be seen from here."""
    return owner.get("host") != platform.node() or psutil.pid_exists(owner["pid"])


def _busy(target: Path, owner: dict[str, Any]) -> str:
    who = f"process {owner['pid']} on {owner['host']} since {owner['since']}" if owner else "another process"
    return f"{target} is in use by {who}: wait until it has ended, or name another output."
