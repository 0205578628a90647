# SPDX-License-Identifier: Apache-2.0
"""A full or faulty disk: the old file is kept, no partial file gets its name, and the system's error is shown."""

from __future__ import annotations

import ctypes
import io
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import scripts.utils.atomic_files
from scripts.cli.main import main
from scripts.image_io.nifti import write_nifti as write_mask
from scripts.utils.atomic_files import write_bytes, write_json, write_text
from scripts.utils.tensor_files import write_atomically

LIMIT = 2048
NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000  # flags of unshare(2)


def limit_files(size: int = LIMIT) -> None:
    """Limit the size of this process's files. Python ignores the signal that would end the process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def mount_small_disk(folder: Path, size: int) -> None:
    """Mount a file system of ``size`` bytes that only this process sees; OSError if that is not permitted."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(NEW_USER | NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "mount")


@pytest.fixture
def small_disk(child: Callable[..., Any], tmp_path: Path) -> Callable[[Path, int], None]:
    """``small_disk(folder, size)`` mounts a small file system in a child process; skips if that is not permitted."""

    def attempt() -> int:
        try:
            mount_small_disk(tmp_path, 1 << 16)
        except OSError as error:
            print(f"{error.strerror}: {os.strerror(error.errno)}")
            return 1
        return 0

    code, printed = child(attempt).end()
    if code:
        pytest.skip(f"this system lets no user mount a file system ({printed.strip()})")
    return mount_small_disk


@pytest.mark.parametrize("old", [b"the mask before", None])
def test_a_mask_above_the_file_size_limit_leaves_the_old_mask_and_names_the_error(
    old: bytes | None, child: Any, sentence: Any, noise_case: Any, segment_arguments: Any, tmp_path: Path
) -> None:
    files, mask = noise_case(tmp_path), tmp_path / "out" / "mask.nii.gz"
    mask.parent.mkdir()
    if old:
        mask.write_bytes(old)
    code, printed = child(lambda: limit_files() or main(segment_arguments(files, mask))).end()
    assert code == 1
    assert str(mask) in sentence(printed)
    assert "File too large" in sentence(printed)
    assert (mask.read_bytes() if mask.exists() else None) == old
    assert [path.name for path in mask.parent.iterdir() if "lock" not in path.name] == (["mask.nii.gz"] if old else [])
    assert main(segment_arguments(files, mask)) == 0
    assert mask.stat().st_size > LIMIT  # so that it was the mask that did not fit


def test_a_mask_on_a_full_disk_leaves_the_old_mask_and_names_the_error(
    child: Any, sentence: Any, small_disk: Any, noise_case: Any, segment_arguments: Any, tmp_path: Path
) -> None:
    files, disk, after = noise_case(tmp_path), tmp_path / "disk", tmp_path / "after"
    disk.mkdir()

    def fill_and_segment() -> int:
        small_disk(disk, 5 * 4096)
        (disk / "mask.nii.gz").write_bytes(b"the mask before")
        (disk / "others").write_bytes(bytes(2 * 4096))  # a page each for the lock's owner and the start of the mask
        code = main(segment_arguments(files, disk / "mask.nii.gz"))
        shutil.copytree(disk, after)
        return code

    code, printed = child(fill_and_segment).end()
    assert code == 1
    assert str(disk / "mask.nii.gz") in sentence(printed)
    assert "No space left on device" in sentence(printed)
    assert sorted(path.name for path in after.iterdir() if "lock" not in path.name) == ["mask.nii.gz", "others"]
    assert (after / "mask.nii.gz").read_bytes() == b"the mask before"


def test_after_a_checkpoint_above_the_size_limit_the_run_resumes_from_the_one_before(
    child: Any, sentence: Any, tiny: list[str], cohort: Path, tmp_path: Path
) -> None:
    arguments = ["train", *tiny, "--dataset-dir", str(cohort), "--epochs", "2", "--set", "spacing=[12,12,12]"]
    arguments += ["--set", "save_interval=1", "--set", "val_interval=100"]
    output, replace = tmp_path / "out", os.replace

    def fill_after_the_first(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target).name == "checkpoint.pt":
            shutil.copy(target, tmp_path / "first.pt")
            limit_files(16384)

    def train() -> int:
        os.replace = fill_after_the_first
        return main([*arguments, "--output-dir", str(output)])

    code, printed = child(train).end()
    checkpoint = output / "checkpoint.pt"
    assert code == 1
    assert str(checkpoint) in sentence(printed)
    assert "File too large" in sentence(printed)
    assert checkpoint.read_bytes() == (tmp_path / "first.pt").read_bytes()
    assert len(checkpoint.read_bytes()) > 16384
    assert not (output / "model.pt").exists()
    assert not list(output.glob(".*.part"))
    assert main([*arguments, "--output-dir", str(output), "--resume"]) == 0
    assert main([*arguments, "--output-dir", str(tmp_path / "whole")]) == 0
    weights, expected = (torch.load(folder / "model.pt", weights_only=True) for folder in (output, tmp_path / "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


class Lossy(io.FileIO):
    """A file of which the system keeps only half, although it reports success."""

    def write(self, data: Any) -> int:
        super().write(bytes(data)[: len(data) // 2])
        return len(data)


class Flipping(io.FileIO):
    """A file in which the system flips one bit of each write."""

    def write(self, data: Any) -> int:
        turned = bytearray(data)
        turned[len(turned) // 2] ^= 1
        super().write(bytes(turned))
        return len(data)


def _mask(path: Path) -> None:
    write_mask(np.random.default_rng(0).integers(0, 2, (8, 8, 8)).astype(np.uint8), np.eye(4), path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "bytes": lambda path: write_bytes(b"new and longer", path),
    "text": lambda path: write_text("new and longer", path),
    "json": lambda path: write_json({"new": "and longer"}, path),
    "mask": _mask,
    "weights": lambda path: write_atomically({"model": {"weight": torch.arange(4096.0)}}, path),
}


@pytest.mark.parametrize("kind", [Lossy, Flipping])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_reads_back_differently_never_gets_its_name(
    writer: str, kind: type[io.FileIO], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.nii.gz"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(
            scripts.utils.atomic_files, "open", lambda p, mode: io.BufferedWriter(kind(p, mode)), raising=False
        )
        with pytest.raises(OSError, match=rf"{path} could not be written \(the file read back differs from") as error:
            WRITERS[writer](path)
    assert error.value.errno
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    WRITERS[writer](path)  # on an honest disk the same content passes
    assert path.read_bytes() != b"old"


def test_another_reader_reads_the_written_mask_completely(tmp_path: Path) -> None:
    _mask(tmp_path / "mask.nii.gz")
    expected = np.random.default_rng(0).integers(0, 2, (8, 8, 8))
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj), expected)


def test_an_error_that_names_another_file_is_passed_on_unchanged(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError) as error, scripts.utils.atomic_files.atomic_file(tmp_path / "a") as file:
        file.write(missing.read_bytes())
    assert error.value.filename == str(missing)
    assert not list(tmp_path.iterdir())
