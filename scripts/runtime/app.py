# SPDX-License-Identifier: Apache-2.0
"""The program of a runtime folder (``export --runtime``): ``python segment.pyz --ct A --pet B --output mask.nii.gz``.

It needs the packages in the folder's requirements.txt, neither PyTorch nor MONAI.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.image_io.suv_values import option
from scripts.runtime.suv_options import add_suv_options, suv_values, values_of_one_patient
from scripts.utils.cpus import usable_cpus
from scripts.utils.errors import EXPECTED_ERRORS, error_sentence

if TYPE_CHECKING:
    from scripts.image_io.dicom_study import Series

TASK, MODEL, SEG = "task.json", "model", "seg.dcm"
# Where the platforms that run containers say that input and output lie: mercure, MONAI Deploy, and the Dockerfile.
FOLDERS = (
    ("MERCURE_IN_DIR", "MERCURE_OUT_DIR"),
    ("HOLOSCAN_INPUT_PATH", "HOLOSCAN_OUTPUT_PATH"),
    ("SEGMENT_IN_DIR", "SEGMENT_OUT_DIR"),
)
# Kaapana: a folder for each case of a batch, and the names of the folders for input and output inside of it.
KAAPANA = ("WORKFLOW_DIR", "BATCH_NAME", "OPERATOR_IN_DIR", "OPERATOR_OUT_DIR")


def build_parser(modalities: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the program; each modality of the task is an option."""
    parser = argparse.ArgumentParser(
        prog="segment.pyz", description="Segment one case, or a folder with a DICOM study.", allow_abbrev=False
    )
    for key in modalities:
        parser.add_argument(
            f"--{key}", dest="image", action="append", type=partial(_named, key), metavar="FILE",
            help=f"the {key} image: NIfTI, MetaImage, NRRD or a DICOM folder",
        )  # fmt: skip
    parser.add_argument("--output", metavar="FILE", help="the mask to write, .nii.gz")
    parser.add_argument("--input", metavar="DIR", help="instead of images: a folder with a DICOM study")
    parser.add_argument("--output-dir", metavar="DIR", help="with --input: folder for mask.nii.gz and seg.dcm")
    parser.add_argument("--allow-missing", action="store_true", help="accept a case without some modalities")
    parser.add_argument(
        "--series-uid", action="append", metavar="UID", help="DICOM series to read where there are several"
    )
    parser.add_argument("--replace-nonfinite", type=float, metavar="VALUE", help="replace NaN and infinite voxels")
    parser.add_argument(
        "--voxel-size", choices=("affine", "pixdim"), help="to believe where a header contradicts itself"
    )
    parser.add_argument("--max-voxels", type=int, metavar="N", help="reject images with more voxels (default: 2^30)")
    add_suv_options(parser)
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: all)")
    return parser


def _named(key: str, path: str) -> tuple[str, str]:
    return key, path


def main(arguments: Sequence[str] | None = None, folder: str | Path | None = None) -> int:
    """Run the program.

    Args:
        arguments: by default those of the command line.
        folder: the runtime folder; by default that of the program.

    Returns:
        The exit code: 0, or 1 after an error (one sentence on stderr). Wrong options exit with 2.
    """
    warnings.filterwarnings("ignore")  # of packages; those about DICOM quote the patient's data
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    folder = Path(folder or Path(sys.argv[0]).resolve().parent)
    task = json.loads((folder / TASK).read_text(encoding="utf-8"))
    parser = build_parser(task["modalities"])
    args = parser.parse_args(arguments)
    try:
        studies = _studies(args)
    except EXPECTED_ERRORS as error:
        print(f"error: {error_sentence(error)}", file=sys.stderr)
        return 1
    if bool(studies) == bool(args.image):
        parser.error("name either images and --output, or --input and --output-dir")
    if not (args.output if args.image else all(target for _, target in studies)):
        parser.error(f"{'--output' if args.image else '--output-dir'} is missing")
    jobs = [partial(_segment_study, args, task, folder, *each) for each in studies]
    failed = False
    for job in jobs or [partial(_segment_images, args, task, folder)]:
        try:
            job()
        except EXPECTED_ERRORS as error:
            print(f"error: {error_sentence(error)}", file=sys.stderr)
            failed = True
    return int(failed)


def _studies(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The folders for input and output: those of the options, or where these name no input, those of a platform.

    A platform names them by variables: one pair, or with Kaapana one for each case of a batch.

    Raises:
        OSError: Kaapana's folder of the batch is missing, or holds no case.
        ValueError: an output folder, or a value of one patient, is given for a batch.
    """
    if args.input:
        return [(args.input, args.output_dir or "")]
    studies = [] if args.image else _platform_folders()
    of_one_case = ["--output-dir"] if args.output_dir else [option(key) for key in values_of_one_patient(args)]
    if of_one_case and len(studies) > 1:
        raise ValueError(f"{of_one_case[0]} is for one case, but the batch has {len(studies)}. Leave it out.")
    return [(source, args.output_dir or target) for source, target in studies]


def _platform_folders() -> list[tuple[str, str]]:
    """The folders that a platform names, see ``_studies``."""
    if all(name in os.environ for name in KAAPANA):
        workflow, batch, source, target = (os.environ[name] for name in KAAPANA)
        folder = Path("/", workflow, batch)
        cases = sorted(path for path in folder.glob("*") if path.is_dir())
        if not cases:
            raise FileNotFoundError(f"The batch {folder} has no case. Check WORKFLOW_DIR and BATCH_NAME.")
        return [(str(case / source), str(case / target)) for case in cases]
    return [(os.environ[source], os.environ.get(target, "")) for source, target in FOLDERS if source in os.environ][:1]


def _segment_images(args: argparse.Namespace, task: Mapping[str, Any], folder: Path) -> None:
    given = dict(args.image)
    if len(given) < len(args.image):
        raise ValueError("A modality is named twice. Keep one image of each.")
    output = Path(args.output)
    if not output.name.endswith(".nii.gz"):
        raise ValueError(f"--output {output} is no name of a mask. Use one that ends in .nii.gz, such as mask.nii.gz.")
    if any(Path(path).resolve() == output.resolve() for path in given.values()):
        raise ValueError(f"--output {output} is one of the images. Choose another file name.")
    images = {key: given[key] for key in task["modalities"] if key in given}
    reference = next(iter(images))
    if reference != task["modalities"][0] and not args.allow_missing:
        missing = ", ".join(f"--{key}" for key in task["modalities"] if key not in images)
        raise ValueError(f"Missing images: {missing}. Add them, or use --allow-missing.")
    segment(args, task, folder, images, output)


def segment(
    args: argparse.Namespace, task: Mapping[str, Any], folder: Path, images: Mapping[str, str], output: Path
) -> None:
    """Segment one case, write its mask and print its path.

    Args:
        args: parsed options.
        task: the settings in the runtime folder.
        folder: the runtime folder.
        images: file or DICOM folder of each modality; the mask lies on the grid of the first.
        output: the mask.

    Raises:
        ValueError: an image is refused, or the model is damaged.
    """
    from scripts.image_io.checks import Rules
    from scripts.runtime.segmenter import Settings, segment_item

    threads = args.threads or usable_cpus()
    limits = {key: vars(args)[key] for key in ("replace_nonfinite", "voxel_size", "max_voxels")}
    limits = {key: value for key, value in limits.items() if value is not None}
    rules = Rules(series_uids=args.series_uid or (), suv=suv_values(args), **limits)
    taken = {key: task[key] for key in Settings.__dataclass_fields__ if key in task}
    of_run = {"rules": rules, "threads": threads, "reference": next(iter(images)), "allow_missing": args.allow_missing}
    of_run |= {"naming": []}  # an image that is not named is not looked for
    settings = Settings(**{**taken, **of_run})
    case = {"case_id": output.name.removesuffix(".nii.gz"), "image": next(iter(images.values())), **images}
    seconds = segment_item(case, settings, partial(_start_engine, folder, task, threads), output)
    print(f"mask: {output} ({sum(seconds.values()):.2f} s)")


def _start_engine(folder: Path, task: Mapping[str, Any], threads: int) -> Any:
    from scripts.runtime.exported_files import RECORD, UnavailableError, check_probe, exported_engine

    record = json.loads((folder / MODEL / RECORD).read_text(encoding="utf-8"))
    advice = "Copy the runtime folder again."
    if record["weights_sha256"] != task["weights_sha256"]:
        raise UnavailableError(f"{folder / TASK} and {folder / MODEL} are of different weights. {advice}")
    engine, _ = exported_engine(folder / MODEL, record, task["engine"], "auto", advice, threads)
    check_probe(engine, folder / MODEL, record, advice)
    return engine


def _segment_study(args: argparse.Namespace, task: Mapping[str, Any], folder: Path, source: str, target: str) -> None:
    """Segment the study in a folder: ``mask.nii.gz``, and ``seg.dcm`` where highdicom is installed."""
    from scripts.image_io.dicom_rules import series_rules
    from scripts.image_io.dicom_study import choose_series, find_series, require_series, series_folders, series_named
    from scripts.image_io.series_preference import preferences

    rules = series_rules(task["modalities"], task["dicom"])
    study = find_series(source, sorted({keyword for rule in rules.values() for keyword in rule}))
    mask = Path(target) / "mask.nii.gz"
    for path in (mask, mask.with_name(SEG)):
        path.unlink(missing_ok=True)  # of an earlier run, maybe of another patient
    wanted = preferences(task["modalities"], task["dicom"])
    chosen = choose_series(study, rules, args.series_uid or (), wanted).series
    require_series(chosen, rules, args.allow_missing, source)
    with tempfile.TemporaryDirectory(prefix="series-") as links:
        folders = series_folders(chosen, Path(links))
        of_study = argparse.Namespace(**{**vars(args), "series_uid": [series.uid for series in chosen.values()]})
        with series_named(folders, chosen):
            segment(of_study, task, folder, folders, mask)
    if importlib.util.find_spec("highdicom") is None:
        print(f"{SEG} was not written, because highdicom is not installed.")
        return
    _write_seg(mask, next(iter(chosen.values())), task)


def _write_seg(mask: Path, reference: Series, task: Mapping[str, Any]) -> None:
    from scripts.image_io.dicom_codes import segment_properties
    from scripts.image_io.dicom_series import series_files
    from scripts.image_io.dicom_writer import read_slices, without_patient_data, write_seg
    from scripts.runtime.regions import region_mask_values

    regions = region_mask_values(*(task[key] for key in ("labels", "classes", "regions", "mask_values")))
    path = mask.with_name(SEG)
    with without_patient_data(path, reference.uid, mask):
        slices = read_slices(list(series_files(reference.folder, [reference.uid]).heads))
        write_seg(mask, slices, regions, segment_properties(regions, task["codes"]), task["bundle_version"], path)
    print(f"DICOM SEG: {path}")
