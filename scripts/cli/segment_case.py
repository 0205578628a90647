# SPDX-License-Identifier: Apache-2.0
"""Segment one case onto the grid of its first modality."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.cli import exported_run
from scripts.cli.bundle_run import resolved_config, run_bundle
from scripts.cli.finished_masks import MANIFEST, SUFFIX, beside
from scripts.cli.measure_case import SUFFIX as MEASURES
from scripts.cli.measure_case import measure_case, write_case_measures
from scripts.cli.options import context_configs, engine_overrides, image_rules, parse_set, profile_configs
from scripts.cli.student_options import network_overrides
from scripts.cli.trained_task import images_sentence, with_trained_settings, with_trained_task

if TYPE_CHECKING:
    from scripts.metrics.lesion_measures import Measures

REPORT = ".report.html"


def segment_case(args: argparse.Namespace) -> list[Measures]:
    """Segment the case that the options of ``segment`` name, and write the mask, its manifest, measures and report.

    Args:
        args: options of ``segment``; ``measures`` is the name of the case in the table of measures and the path of the
            table, by default those of the mask; ``bbox_mm`` the part of the reference image that the mask covers.

    Returns:
        The measures of the mask; none with ``no_measures`` and ``dry_run``.

    Raises:
        ValueError: see ``mask_and_images``, or the images are refused.
    """
    configs = ["inference", *context_configs(args), *profile_configs(args)]
    task = with_trained_settings(args, configs, network_overrides(args))
    config = resolved_config(args, configs, task)
    mask, images, reference = mask_and_images(args, config["modalities"], bool(config["allow_missing"]))
    case_id = mask.name.removesuffix(SUFFIX)
    case = {"case_id": case_id, "image": images[reference], **({} if args.stacked else images)}
    if args.bbox_mm:
        case["bbox_mm"] = args.bbox_mm
    overrides = {
        **task,
        "datalist": [case],
        "naming": [],
        "reference": reference,
        "output_dir": str(mask.parent),
        "manifest_name": f"{case_id}{MANIFEST}",
        "locked": str(mask),
        **engine_overrides(args),
    }
    if args.weights:
        overrides["weights"] = args.weights
    if args.stacked:
        overrides["stacked"] = True
    config = resolved_config(args, configs, overrides)
    exported_run.export_once(args, config)
    reason = exported_run.obstacle(args, config)
    if reason:
        run_bundle(args, configs, with_trained_task(args, configs, overrides), reason)
    else:
        of_measures = () if args.no_measures else ("scripts.image_io.mask_measures",)  # they load SciPy
        with exported_run.loaded_meanwhile(*of_measures):
            exported_run.segment_exported(args, configs, config, overrides, mask)
    if args.dry_run:
        return []
    print(f"mask: {mask}")
    stacked, modalities = bool(config["stacked"]), config["modalities"]
    if stacked:
        images = dict.fromkeys(modalities, images[reference])
    name, table = args.measures or (case_id, beside(mask, MEASURES))
    for path in (table, beside(mask, REPORT)):
        path.unlink(missing_ok=True)  # of an earlier mask
    measured, rows = [], []
    if not args.no_measures:
        measured = measure_case(mask, images, stacked, config)
        rows = write_case_measures(name, table, measured)
    if args.report:
        from scripts.report.mask_report import write_mask_report
        from scripts.runtime.regions import region_mask_values

        regions = region_mask_values(*(config[key] for key in ("labels", "classes", "regions", "mask_values")))
        rules, intensity = image_rules(config), {key: config["intensity"][key] for key in modalities}
        report = write_mask_report(mask, images, stacked, rules, intensity, regions, rows)
        print(f"report: {report}")
    return measured


def refuse_other_folder(args: argparse.Namespace) -> None:
    """Refuse ``--set output_dir``, which would win over the folder of the mask that an option names."""
    if any(key.removeprefix("+") == "output_dir" for key in parse_set(args.set)):
        raise ValueError(
            "--set output_dir cannot be used here. Name one mask with --output, or the folder of several with "
            "--output-dir."
        )


def named_images(args: argparse.Namespace, modalities: Sequence[str]) -> dict[str, str]:
    """The image of each modality that the options name, in the order of the modalities.

    Raises:
        ValueError: a modality is unknown, or is named twice.
    """
    images: dict[str, str] = {}
    for key, path in args.image or []:
        if key not in modalities:
            sentence = images_sentence(args, modalities)
            raise ValueError(f"--image {key}={path}: {key} is no modality of this task. {sentence}")
        if key in images:
            raise ValueError(f"Two images are named as {key}: {images[key]} and {path}. Keep one.")
        images[key] = path
    return {key: images[key] for key in modalities if key in images}


def mask_and_images(
    args: argparse.Namespace, modalities: Sequence[str], allow_missing: bool
) -> tuple[Path, dict[str, str], str]:
    """The mask to write, the image of each modality, and the modality on whose grid the mask lies.

    Args:
        args: options of ``segment``.
        modalities: input of the network, the reference first.
        allow_missing: if the reference modality is missing, use the first modality that is present instead.

    Raises:
        ValueError: no image or no mask is named, the mask would overwrite an image, an option works with tables only,
            or the reference is missing.
    """
    if not args.output:
        raise ValueError("No output. Name the mask with --output, or several cases with --data-list or --dataset-dir.")
    if args.output_dir:
        raise ValueError("--output-dir is the folder of several masks. Remove it: --output names the mask.")
    refuse_other_folder(args)
    if args.bids:
        raise ValueError("--bids names the masks of several cases. Add --data-list or --dataset-dir, or remove --bids.")
    mask = Path(args.output)
    if not mask.name.endswith(SUFFIX) or mask.name == SUFFIX:
        raise ValueError(f"--output {mask} is no name of a mask. Use one that ends in {SUFFIX}, such as mask{SUFFIX}.")
    images = named_images(args, modalities)
    if args.stacked:
        images = dict.fromkeys(modalities, args.stacked)
    if not images:
        raise ValueError(f"No image to segment. Name the images with --{', --'.join(modalities)}.")
    for key, path in images.items():
        if Path(path).resolve() == mask.resolve():
            raise ValueError(f"--output {mask} is the {key} image itself. Choose another file name.")
    reference = next(iter(images))
    if reference != modalities[0]:
        missing = ", ".join(f"--{key}" for key in modalities if key not in images)
        if not allow_missing:
            raise ValueError(
                f"Missing images: {missing}. Add them, or use --allow-missing (the mask is then written on the grid of "
                f"--{reference})."
            )
        print(f"The mask is written on the grid of --{reference}, because --{modalities[0]} is missing.")
    return mask, images, reference
