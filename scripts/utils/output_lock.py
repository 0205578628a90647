# SPDX-License-Identifier: Apache-2.0
"""Lock an output, so that only one run at a time writes to it."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from scripts.utils.atomic_files import write_json

logger = logging.getLogger(__name__)

TAKEOVER_SECONDS = 30.0  # how long the child processes of a killed run may need to notice its end
OWNER_SECONDS = 1.0  # how long the owner of a lock may need to write its name
_locks: dict[Path, tuple[FileLock, Path]] = {}  # output -> its lock and the file that names its owner
_held: set[Path] = set()  # outputs that ``hold`` releases


def acquire(path: str | Path) -> None:
    """Lock an output until this process ends or calls ``release``.

    The operating system releases the lock of a killed process. The next run takes over such an output, logs a warning
    and removes the ``.part`` files that the killed run left.

    Args:
        path: folder of a run's output, or the single mask (.nii.gz) that the run writes.

    Raises:
        ValueError: another process holds the lock; the message names that process.
        OSError: no file can be created in the folder.
    """
    target = Path(path).absolute()
    if target in _locks:
        return
    is_mask = target.name.endswith(".nii.gz")
    folder = target.parent if is_mask else target
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if folder.is_file():
            raise FileExistsError(f"{folder} is a file. Name a folder.") from error
        raise OSError(error.errno, f"{target} cannot be written ({error.strerror}): choose another output.") from error
    prefix = f".{target.name}" if is_mask else ""
    owner_file = folder / f"{prefix}.run.json"
    lock = FileLock(folder / f"{prefix}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        _require_writable(target, lock.lock_file)
        owner = _wait_for_owner(owner_file)
        try:
            lock.acquire(timeout=0 if _is_alive(owner) else TAKEOVER_SECONDS)
        except Timeout:
            raise ValueError(_in_use(target, owner)) from None
    _locks[target] = lock, owner_file
    try:
        _take_over(target, folder, is_mask, _read_owner(owner_file))
        write_json({"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%F %T")}, owner_file)
    except BaseException:
        _release_one(target)
        raise
    atexit.register(release, os.getpid())


@contextlib.contextmanager
def hold(path: str | Path) -> Iterator[None]:
    """Lock an output for a block of several runs; arguments and errors as for ``acquire``."""
    target = Path(path).absolute()
    is_outermost = target not in _locks
    acquire(target)
    if is_outermost:
        _held.add(target)
    try:
        yield
    finally:
        if is_outermost:
            _held.discard(target)
            _release_one(target)


def _take_over(target: Path, folder: Path, is_mask: bool, previous: dict[str, Any]) -> None:
    """Remove what a run that was killed has left at an output, and log a warning."""
    pid = previous.get("pid")
    if pid is None or pid == os.getpid():
        return
    logger.warning("%s was left by process %s, which has ended: this run takes it over", target, pid)
    parts = folder.glob(f".{target.name}.*.part") if is_mask else folder.rglob(".*.part")
    for part in parts:
        # Other runs, each with its own lock, may still be writing masks into the same folder.
        writer = part.name.split(".")[-2]
        if is_mask or writer == str(pid) or (writer.isdigit() and not psutil.pid_exists(int(writer))):
            part.unlink(missing_ok=True)


def release(pid: int | None = None) -> None:
    """Release every output that this process has locked, and remove the lock's files; ``hold`` keeps its own.

    Args:
        pid: the process that acquired the locks, at its end: all are released. In any other process, such as a forked
            child, nothing is released.
    """
    for target in [target for target in _locks if pid in (None, os.getpid())]:
        if pid is not None or target not in _held:
            _release_one(target)


def _release_one(target: Path) -> None:
    lock, owner_file = _locks.pop(target, (None, None))
    if lock is None or owner_file is None:
        return
    owner_file.unlink(missing_ok=True)
    _remove_lock_file(lock)
    lock.release()


def _remove_lock_file(lock: FileLock) -> None:
    """Remove a lock's empty file while the lock is still held.

    Two processes never both get the lock. A process may have opened this file before and lock it after the release, but
    filelock (from 4 on) then sees that the file has no name any more and opens the path again. Removal after the
    release would be wrong: the path could already be another process's lock. On a file system without flock, filelock
    writes the owner into the file, and removes it itself.
    """
    with contextlib.suppress(OSError):
        lock_file = Path(lock.lock_file)
        if lock_file.stat().st_size == 0:
            lock_file.unlink()


def _require_writable(target: Path, lock_file: str) -> None:
    """Raise OSError if no file can be created in a folder such as /proc; filelock reports such a lock as taken."""
    try:
        os.close(os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o644))
    except OSError as error:
        message = (
            f"{target} cannot be written, because no file can be created in its folder ({error.strerror}): choose "
            "another output."
        )
        raise OSError(error.errno, message) from error


def _read_owner(owner_file: Path) -> dict[str, Any]:
    """Read which process owns an output: ``pid``, ``host``, ``since``; empty if the file is missing or damaged."""
    try:
        owner = json.loads(owner_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_complete = isinstance(owner, dict) and {"host", "since"} <= set(owner) and isinstance(owner.get("pid"), int)
    return owner if is_complete else {}


def _wait_for_owner(owner_file: Path) -> dict[str, Any]:
    """Read the owner of a lock that is taken; it writes its name just after it gets the lock."""
    end = time.monotonic() + OWNER_SECONDS
    while not (owner := _read_owner(owner_file)) and time.monotonic() < end:
        time.sleep(0.02)
    return owner


def _is_alive(owner: dict[str, Any]) -> bool:
    """Return whether the owner may still run; processes of another host cannot be checked and count as alive."""
    return owner.get("host") != platform.node() or psutil.pid_exists(owner["pid"])


def _in_use(target: Path, owner: dict[str, Any]) -> str:
    process = f"process {owner['pid']} on {owner['host']} since {owner['since']}" if owner else "another process"
    return f"{target} is in use by {process}: wait until it has ended, or choose another output."
