# SPDX-License-Identifier: Apache-2.0
"""Fuzz the image readers: every damaged file must be read completely, or refused with a one-line message.

    python benchmarks/fuzz_readers.py [--mutations N] [--dicom-mutations N] [--seed S] [--json FILE]

Headers of NIfTI-1, NIfTI-2 and MetaImage get random bytes and boundary values in every field; gzip and zlib streams
get flipped bits, cuts, inserted bytes, further members and bombs; for DICOM files see ``benchmarks.fuzz_dicom``. Each
file is read twice: with ``header_of`` and ``read_volume``, and with ``LoadModalitiesd`` together with an undamaged
file. Accepted outcomes are:

- a volume of the shape in the header (parsed here with ``struct``) whose stream Python's own gzip accepts;
- a ValueError or OSError with a one-line message that names the file.

Faults are any other error, a crash, more than ``SECONDS``, and more than ``MAX_MEMORY`` bytes of address space. The
readers run in child processes, which a signal ends if they hang.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gzip
import json
import logging
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813
import torch

from benchmarks import fuzz_dicom
from scripts.data.case_io import LoadModalitiesd
from scripts.image_io.checks import Rules
from scripts.image_io.dicom_study import find_series
from scripts.image_io.reader import header_of, read_volume

SECONDS = 5
MAX_MEMORY = 256 * 2**20  # bytes; each file has some kilobytes
M_ARENA_MAX = -8  # option of glibc's mallopt
RULES = Rules(max_voxels=2**26)  # limits the memory of a fault to some hundred megabytes
SHAPE = (9, 8, 7)
INTEGERS = (0, 1, -1, 2, 7, 255, 400, 32767, -32768, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63))
REALS = (0.0, -0.0, 1.0, -1.0, 0.5, 352.5, 1e-45, 1e30, 3.4e38, -3.4e38, float("nan"), float("inf"), float("-inf"))
WORDS = (
    *("", "0", "-1", "1", "4", "1e400", "nan", "inf", "-inf", "99999999999999999999", "400 400 400", "2147483647 1 1"),
    *("True", "False", "LOCAL", "LIST", "%s%n", "x" * 5000, "MET_FLOAT", "MET_DOUBLE", "MET_UCHAR_ARRAY"),
    *("9 8", "9 8 7 1", "1 2 3 4"),
)

Mutated = tuple[str, bytes]  # suffix and bytes of a file
Classify = Callable[[Path, Path, bytes], str]


def _image(kind: str, folder: Path) -> bytes:
    """The bytes of an undamaged, uncompressed file of noise, written by nibabel or ITK."""
    voxels = np.random.default_rng(0).integers(0, 900, SHAPE).astype(np.int16)
    affine = np.diag([2.0, -2.5, 3.0, 1.0])
    if kind == "mha":
        image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
        image.SetSpacing((2.0, 2.5, 3.0))
        sitk.WriteImage(image, str(folder / "whole.mha"), useCompression=False)
        return (folder / "whole.mha").read_bytes()
    image = (nib.Nifti1Image if kind == "nifti1" else nib.Nifti2Image)(voxels, affine)
    image.set_qform(affine, code=1)
    return image.to_bytes()


def _nifti_fields(kind: str) -> list[tuple[int, str]]:
    """Offset and type of every number in a header."""
    template = (nib.Nifti1Header if kind == "nifti1" else nib.Nifti2Header).template_dtype
    numbers = []
    for name in template.names:
        dtype, offset = template.fields[name][:2]
        base, count = (dtype.base, int(np.prod(dtype.shape))) if dtype.shape else (dtype, 1)
        numbers += [(offset + i * base.itemsize, base.str) for i in range(count)]
    return numbers


def mutate_field(data: bytes, rng: random.Random, kind: str) -> bytes:
    """Set one or two numbers of a NIfTI header, or all three sizes, to a boundary value of their type."""
    header = bytearray(data)
    fields = _nifti_fields(kind)
    chosen = [rng.choice(fields) for _ in range(rng.choice((1, 1, 2)))]
    if rng.random() < 0.05:
        first, step = (40, 2) if kind == "nifti1" else (16, 8)
        chosen = [(first + step * i, f"<i{step}") for i in (1, 2, 3)]
    value: Any = rng.choice(INTEGERS)
    for offset, code in chosen:
        dtype = np.dtype(code)
        if dtype.kind == "f":
            raw = np.array(rng.choice(REALS)).astype(dtype).tobytes()
        elif dtype.kind in "iu":
            info = np.iinfo(dtype)
            raw = np.array(min(max(value, info.min), info.max), dtype=dtype).tobytes()
        else:
            raw = rng.randbytes(dtype.itemsize)
        header[offset : offset + dtype.itemsize] = raw
    return bytes(header)


def mutate_bytes(data: bytes, rng: random.Random, end: int) -> bytes:
    """Change up to eight random bytes before ``end``."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(end)] = rng.randrange(256)
    return bytes(changed)


def mutate_line(data: bytes, rng: random.Random) -> bytes:
    """Change, repeat, remove or add a line of a MetaImage header, or change its separators."""
    head, mark, voxels = data.partition(b"ElementDataFile = LOCAL\n")
    lines = [line.decode().split(" = ") for line in (head + mark).splitlines()]
    at = rng.randrange(len(lines))
    how = rng.randrange(5)
    if how <= 1:
        lines[at][1] = rng.choice(WORDS)
    elif how == 2:
        lines.insert(rng.randrange(len(lines)), [lines[at][0], rng.choice(WORDS)])
    elif how == 3:
        del lines[at]
    else:
        extra = rng.choice(("HeaderSize", "ElementNumberOfChannels", "CompressedDataSize", "ElementSize", "Comment"))
        lines.insert(rng.randrange(len(lines)), [extra, rng.choice(WORDS)])
    sign = rng.choice((" = ", " = ", " = ", "=", " =\t"))
    return "".join(f"{sign.join(line)}\n" for line in lines).encode() + voxels


def mutate_stream(packed: bytes, rng: random.Random, member: Callable[[bytes], bytes]) -> bytes:
    """Flip a bit, truncate, insert or remove bytes, or append zeros, garbage or further members."""
    how, at = rng.randrange(7), rng.randrange(len(packed))
    if how == 0:
        return packed[:at] + bytes([packed[at] ^ 1 << rng.randrange(8)]) + packed[at + 1 :]
    if how == 1:
        return packed[:at]
    if how == 2:
        return packed[:at] + rng.randbytes(rng.randint(1, 30)) + packed[at:]
    if how == 3:
        return packed[:at] + packed[at + rng.randint(1, 30) :]
    if how == 4:
        return packed + rng.choice((bytes(rng.randint(1, 600)), rng.randbytes(rng.randint(1, 600)), packed[:at]))
    if how == 5:
        return member(b"") * rng.randint(1, 20_000) + packed
    return packed + member(b"") * rng.randint(1, 20_000) + member(rng.randbytes(rng.randint(0, 3)))


def _pack(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


def _bomb(data: bytes, rng: random.Random) -> bytes:
    """Append megabytes of zeros to the voxels, in one gzip member or many."""
    zeros = bytes(rng.randint(1, 300) * 2**20 // 10)
    if rng.random() < 0.5:
        return _pack(data + zeros)
    return _pack(data) + _pack(zeros) * rng.randint(1, 20)


def _packed_mha(data: bytes, size: str | None = None) -> bytes:
    head, mark, voxels = data.partition(b"ElementDataFile = LOCAL\n")
    packed = zlib.compress(voxels)
    head = head.replace(b"CompressedData = False\n", b"CompressedData = True\n")
    if size is not None:
        head = head.replace(b"DimSize = 9 8 7", b"DimSize = " + size.encode())
    return head + mark + packed


def mutate(kind: str, rng: random.Random, undamaged: dict[str, bytes]) -> Mutated:
    """Make one damaged file."""
    source, _, how = kind.partition(" ")
    data = undamaged[source]
    if source == "mha":
        packed = _packed_mha(data, "400 400 400" if rng.random() < 0.05 else None)
        start = packed.index(b"LOCAL\n") + 6
        if how == "fields":
            return "mha", mutate_line(rng.choice((data, packed)), rng)
        if how == "bytes":
            return "mha", mutate_bytes(data, rng, data.index(b"LOCAL\n") + 6)
        if how == "cut":
            return "mha", data[: rng.randrange(len(data))]
        return "mha", packed[:start] + mutate_stream(packed[start:], rng, zlib.compress)
    if how == "fields":
        data = mutate_field(data, rng, source)
    elif how == "bytes":
        data = mutate_bytes(data, rng, 352 if source == "nifti1" else 544)
    elif how == "cut":
        data = data[: rng.randrange(len(data))] if rng.random() < 0.7 else data + rng.randbytes(rng.randint(1, 99))
    elif how == "bomb":
        return "nii.gz", _bomb(data, rng)
    else:
        return "nii.gz", mutate_stream(_pack(data), rng, _pack)
    return ("nii", data) if rng.random() < 0.5 else ("nii.gz", _pack(data))


KINDS = [f"{source} {how}" for source in ("nifti1", "nifti2") for how in ("fields", "bytes", "cut", "stream", "bomb")]
KINDS += [f"mha {how}" for how in ("fields", "bytes", "cut", "stream")]
SHARES = [3, 3, 1, 3, 0.2] * 2 + [4, 3, 1, 3]


def stated_shape(name: str, data: bytes) -> tuple[int, ...]:
    """The shape in a file's header, parsed without the readers' code; trailing axes of length 1 are dropped."""
    if name == "mha":
        fields = [line.split(b"=", 1) for line in data.partition(b"ElementDataFile")[0].splitlines() if b"=" in line]
        sizes = [int(n) for n in next(text for key, text in fields if key.strip() == b"DimSize").split()]
    else:
        order = "<" if data[:4] in (struct.pack("<i", 348), struct.pack("<i", 540)) else ">"
        one = 348 in struct.unpack("<i", data[:4]) + struct.unpack(">i", data[:4])
        dims = struct.unpack(order + ("8h" if one else "8q"), data[40:56] if one else data[16:80])
        sizes = list(dims[1 : dims[0] + 1])
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes + [1] * (3 - len(sizes)))


def outcome_of(path: Path, undamaged: Path, data: bytes) -> str:
    """``read``, ``refused``, or a description that begins with ``fault``."""
    outcomes = []
    load = LoadModalitiesd(["ct", "pet"], rules=RULES)
    for read in (
        lambda: read_volume(header_of(path, RULES), RULES),
        lambda: load({"ct": path, "pet": undamaged})["ct"],
    ):
        try:
            outcomes.append(read())
        except (ValueError, OSError) as error:
            text = str(error)
            if str(path) not in text or "\n" in text or not (isinstance(error, OSError) or text.endswith(".")):
                return f"fault: not a one-line message that names the file: {text[:200]!r}"
            outcomes.append(None)
        except Exception as error:
            return f"fault: {type(error).__name__}: {str(error)[:200]}"
    volume, loaded = outcomes
    if volume is None:
        return "refused" if loaded is None else "fault: only read together with another file"
    name = path.name.partition(".")[2]
    try:
        plain = gzip.decompress(data) if name == "nii.gz" else data
    except (OSError, EOFError, zlib.error) as error:
        return f"fault: read, although gzip says: {error}"
    if tuple(volume.shape) != (1, *stated_shape(name, plain)):
        return f"fault: shape {tuple(volume.shape)}, in the header {stated_shape(name, plain)}"
    if volume.dtype not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.float32, torch.float64):
        return f"fault: type {volume.dtype}"
    return "read" if bool(torch.isfinite(volume.affine).all()) else "fault: the affine is not finite"


def outcome_of_dicom(folder: Path, undamaged: Path, files: fuzz_dicom.Mutated) -> str:
    """Like ``outcome_of`` for a folder of DICOM files, which is also listed like a study."""
    load, outcomes = LoadModalitiesd(["image", "other"], rules=RULES), []
    for read in (
        lambda: header_of(folder, RULES),
        lambda: read_volume(header_of(folder, RULES), RULES),
        lambda: load({"image": folder, "other": undamaged})["image"],
        lambda: find_series(folder),
    ):
        try:
            outcomes.append(read())
        except (ValueError, OSError) as error:
            text = str(error)
            if str(folder) not in text or "\n" in text or not (isinstance(error, OSError) or text.endswith(".")):
                return f"fault: not a one-line message that names the file: {text[:200]!r}"
            outcomes.append(None)
        except Exception as error:
            return f"fault: {type(error).__name__}: {str(error)[:200]}"
    header, volume, loaded, _ = outcomes
    if volume is None:
        return "refused" if loaded is None else "fault: only read together with another file"
    if not header.warnings and not header.notes:
        stated = fuzz_dicom.stated_shape(files)
        if tuple(volume.shape) != (1, *stated):
            return f"fault: shape {tuple(volume.shape)}, in the headers {stated}"
    return "read" if bool(torch.isfinite(volume.affine).all()) else "fault: the affine is not finite"


def _address_space(field: str) -> int:
    """``VmPeak`` or ``VmSize`` in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _run_mutations(first: int, last: int, seed: int, folder: Path, classify: Classify, dicom: bool) -> None:
    """Read mutations and write a line for each; runs in a child process."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    faulthandler.disable()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, even in C code
    good = folder / "good.nii"
    undamaged: Any = fuzz_dicom.samples() if dicom else {s: _image(s, folder) for s in ("nifti1", "nifti2", "mha")}
    good.write_bytes(_image("nifti1", folder) if dicom else undamaged["nifti1"])
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)  # otherwise threads reserve address space of their own
    for sample in undamaged.values() if dicom else ():  # imports every decoder
        content = [fuzz_dicom.joined(each, each.data) for each in sample]
        assert classify(_written(folder / "good", content), good, content) == "read"
        shutil.rmtree(folder / "good")
    outcome_of(good, good, good.read_bytes())  # starts all threads, which allocate their stacks
    before = _address_space("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (before + 8 * MAX_MEMORY, resource.RLIM_INFINITY))
    with open(folder / "lines", "a", encoding="utf-8", buffering=1) as lines:
        for number in range(first, last):
            rng = random.Random(f"{seed} {number}")
            data: Any
            if dicom:
                kind = rng.choices(fuzz_dicom.KINDS, fuzz_dicom.SHARES)[0]
                data = fuzz_dicom.mutate(kind, rng, undamaged)
                path = _written(folder / f"case_{number}", data)
            else:
                kind = rng.choices(KINDS, SHARES)[0]
                ending, data = mutate(kind, rng, undamaged)
                path = folder / f"case_{number}.{ending}"
                path.write_bytes(data)
            lines.write(json.dumps([number, kind]) + "\n")
            peak = _address_space("VmPeak")
            signal.alarm(SECONDS)
            outcome = classify(path, good, data)
            signal.alarm(0)
            now = _address_space("VmPeak")
            if now > peak and now - before > MAX_MEMORY and not outcome.startswith("fault"):
                outcome = f"fault: {(now - before) >> 20} MiB of address space"
            if not outcome.startswith("fault"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            lines.write(json.dumps([number, kind, outcome]) + "\n")


def _written(folder: Path, files: fuzz_dicom.Mutated) -> Path:
    folder.mkdir()
    for number, content in enumerate(files):
        (folder / f"{number}.dcm").write_bytes(content)
    return folder


def fuzz(mutations: int, seed: int, folder: Path, dicom: bool = False) -> list[tuple[int, str, str]]:
    """Number, kind and outcome of every mutation; files that cause faults stay in ``folder``."""
    classify: Any = outcome_of_dicom if dicom else outcome_of
    done: dict[int, tuple[int, str, str]] = {}
    first = 0
    while first < mutations:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                _run_mutations(first, mutations, seed, folder, classify, dicom)
            finally:
                os._exit(0)
        status = os.waitpid(child, 0)[1]
        lines = [json.loads(line) for line in (folder / "lines").read_text(encoding="utf-8").splitlines()]
        done.update({line[0]: tuple(line) for line in lines if len(line) == 3})
        number, kind = lines[-1][:2]
        if number not in done:
            ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            how = f"more than {SECONDS} s" if ended == signal.SIGALRM else f"ended by signal {ended}"
            done[number] = (number, kind, f"fault: {how}")
        first = number + 1
    return [done[number] for number in sorted(done)]


def summary(outcomes: list[tuple[int, str, str]], seed: int) -> dict[str, Any]:
    """Counts of outcomes by kind of mutation."""
    kinds: dict[str, Counter[str]] = {kind: Counter() for kind in [*KINDS, *fuzz_dicom.KINDS]}
    for _, kind, outcome in outcomes:
        kinds[kind].update(["mutations", outcome.partition(":")[0]])
    table = {k: {n: c[n] for n in ("mutations", "refused", "read", "fault")} for k, c in kinds.items() if c}
    total = {n: sum(c[n] for c in table.values()) for n in ("mutations", "refused", "read", "fault")}
    limits = {"seconds": SECONDS, "address_space_mib": MAX_MEMORY >> 20}
    return {"seed": seed, "limits_per_mutation": limits, "total": total, "kinds": table}


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the image readers with damaged files.")
    parser.add_argument("--mutations", type=int, default=12_000)
    parser.add_argument("--dicom-mutations", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--keep", metavar="FOLDER", help="folder that keeps the files that cause faults")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.keep or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = []
        for name, mutations in (("files", options.mutations), ("dicom", options.dicom_mutations)):
            (folder / name).mkdir(exist_ok=True)
            outcomes += fuzz(mutations, options.seed, folder / name, name == "dicom") if mutations else []
    counts = summary(outcomes, options.seed)
    for number, kind, outcome in outcomes:
        if outcome.startswith("fault"):
            print(f"{number} ({kind}): {outcome}")
    print(", ".join(f"{value} {name}" for name, value in counts["total"].items()))
    if options.json:
        Path(options.json).write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    return 1 if counts["total"]["fault"] else 0


if __name__ == "__main__":
    sys.exit(main())
