# SPDX-License-Identifier: Apache-2.0
"""Classes and regions of a task. Classes are disjoint and make up the label; regions are unions of classes.

A task names the label file's values of each class (``labels``, the background first). Regions are what is scored,
reported and exported, such as the whole tumour; by default each foreground class is one. In this module ``values`` are
those of the label files and ``classes`` are indices, from 0 for the background.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from scripts.metrics.case_rows import FOREGROUND
from scripts.utils.values import HEADS, is_list, is_number

IGNORED = 254  # class index of voxels that count in no loss and no score

Labels = Sequence[Sequence[float]]
Regions = Mapping[str, Sequence[float]]


def class_names(labels: Labels, classes: Sequence[str] | None = None) -> list[str]:
    """The name of each class, the background first; ``classes`` or names made from the class's index."""
    if classes:
        return list(classes)
    if len(labels) == 2:
        return ["background", FOREGROUND]
    return ["background", *(f"class {index}" for index in range(1, len(labels)))]


def region_values(
    labels: Labels, classes: Sequence[str] | None = None, regions: Regions | None = None
) -> dict[str, list[float]]:
    """The label file's values of each region, in the order of the task.

    Args:
        labels: values of each class, the background first.
        classes: their names.
        regions: name -> values; by default one region for each foreground class.
    """
    if regions:
        return {str(name): list(values) for name, values in regions.items()}
    names = class_names(labels, classes)
    return {name: list(values) for name, values in zip(names[1:], labels[1:], strict=True)}


def region_classes(
    labels: Labels, classes: Sequence[str] | None = None, regions: Regions | None = None
) -> dict[str, list[int]]:
    """The classes of each region, in the order of the task; arguments as for ``region_values``."""
    members = region_values(labels, classes, regions)
    return {
        name: [index for index, each in enumerate(labels) if set(each) <= set(values)]
        for name, values in members.items()
    }


def sigmoid_regions(
    labels: Labels, head: str, classes: Sequence[str] | None = None, regions: Regions | None = None
) -> list[list[int]] | None:
    """The classes of each channel of a sigmoid head; None for softmax, whose channels are the classes.

    Raises:
        ValueError: ``head`` is unknown.
    """
    if head not in HEADS:
        raise ValueError(f"head is {head!r}. Choose one of {', '.join(HEADS)}.")
    return list(region_classes(labels, classes, regions).values()) if head == "sigmoid" else None


def own_classes(regions: Sequence[Sequence[int]]) -> list[int]:
    """The class that a voxel gets for each region of a sigmoid head, where no later region contains the voxel.

    A mask holds one value per voxel. The regions are decided one after the other, and each overwrites those before it.
    So a region stands for its class that no later region has: with the whole tumour {1, 2, 3}, its core {1, 3} and the
    enhancing part {3}, these are 2, 1 and 3.

    Args:
        regions: the classes of each region.

    Raises:
        ValueError: all classes of a region are in later regions, or it has several of its own.
    """
    chosen = []
    for index, members in enumerate(regions):
        later = {each for region in regions[index + 1 :] for each in region}
        own = [each for each in members if each not in later]
        if len(own) != 1:
            raise ValueError(
                f"With the head sigmoid each region needs one class that no later region has, but region {index + 1} "
                f"of {len(regions)} has {len(own)}. Order the regions from the outermost to the innermost."
            )
        chosen.append(own[0])
    return chosen


def mask_values(labels: Labels, mode: str = "file") -> list[float]:
    """The value of each class in written masks.

    Args:
        labels: values of each class, the background first.
        mode: ``"file"``, the first of the class's values in the label files, or ``"index"``, the class's index.

    Raises:
        ValueError: ``mode`` is unknown.
    """
    if mode not in ("file", "index"):
        raise ValueError(f'mask_values is {mode!r}. Give "file" or "index".')
    return [values[0] if mode == "file" else index for index, values in enumerate(labels)]


def region_mask_values(
    labels: Labels, classes: Sequence[str] | None = None, regions: Regions | None = None, mode: str = "file"
) -> dict[str, list[float]]:
    """The values of each region in written masks; arguments as for ``region_classes`` and ``mask_values``."""
    values = mask_values(labels, mode)
    return {
        name: [values[index] for index in members] for name, members in region_classes(labels, classes, regions).items()
    }


def class_mask_values(
    labels: Labels, classes: Sequence[str] | None = None, regions: Regions | None = None, mode: str = "file"
) -> dict[str, float]:
    """The value of each foreground class in written masks, by the name of the class.

    A class that the task does not name has the name of the region that consists of it alone, if there is one.
    Arguments as for ``region_classes`` and ``mask_values``.
    """
    names = class_names(labels, classes)
    if not classes:
        alone = {
            members[0]: name for name, members in region_classes(labels, None, regions).items() if len(members) == 1
        }
        names = [alone.get(index, name) for index, name in enumerate(names)]
    return dict(zip(names[1:], mask_values(labels, mode)[1:], strict=True))


def check_classes(
    labels: Labels,
    classes: Sequence[str] | None = None,
    regions: Regions | None = None,
    ignore: float | None = None,
    head: str = "softmax",
) -> None:
    """Refuse classes and regions that contradict each other.

    Args:
        labels: values of each class, the background first.
        classes: their names.
        regions: name -> values of a region.
        ignore: the value of voxels that count in no loss and no score.
        head: ``"softmax"`` over the classes, or ``"sigmoid"``, one channel per region.

    Raises:
        ValueError: there are too many classes; a value is listed twice; a region has an unknown value, the background,
            or only some values of a class; two regions are equal; the names do not fit; the regions of a sigmoid head
            are in the wrong order.
    """
    owners = _owners(labels)
    if len(labels) > IGNORED:
        raise ValueError(
            f"labels has {len(labels)} classes. At most {IGNORED} are possible: a mask has a byte per voxel."
        )
    if ignore is not None and ignore in owners:
        raise ValueError(f"ignore is {ignore:g}, which labels lists in class {owners[ignore]}. Remove it from labels.")
    if classes is not None and (len(classes) != len(labels) or len(set(classes)) != len(classes)):
        raise ValueError(
            f"classes names {', '.join(map(str, classes))}, but labels has {len(labels)} classes. Give each class one "
            "name of its own, the background first."
        )
    for name, values in (regions or {}).items():
        _check_region(name, values, labels, owners)
    members = region_classes(labels, classes, regions)
    for name, chosen in members.items():
        same = [other for other, others in members.items() if other != name and others == chosen]
        if same:
            raise ValueError(f"The regions {name} and {same[0]} have the same values. Remove one of them.")
    channels = sigmoid_regions(labels, head, classes, regions)
    if channels is not None:
        own_classes(channels)


def _owners(labels: Labels) -> dict[float, int]:
    """Value -> class."""
    owners: dict[float, int] = {}
    for index, values in enumerate(labels):
        for value in values:
            if not is_number(value):
                raise ValueError(f"labels lists {value!r} in class {index}. Give numbers.")
            first = owners.setdefault(value, index)
            if first != index:
                raise ValueError(
                    f"labels lists the value {value:g} in classes {first} and {index}. Give each value to one class, "
                    "and name unions of classes as regions, such as "
                    '"regions": {"WT": [1, 2, 4], "TC": [1, 4]}.'
                )
    return owners


def _check_region(name: str, values: object, labels: Labels, owners: Mapping[float, int]) -> None:
    if not is_list(values) or not values:  # type: ignore[arg-type]
        raise ValueError(f"The region {name} is {values!r}. Give the label file's values, such as [1, 2].")
    for value in values:  # type: ignore[attr-defined]
        if not is_number(value) or value not in owners:
            known = ", ".join(f"{each:g}" for each in owners)
            raise ValueError(f"The region {name} has the value {value}, which is of no class in labels ({known}).")
        index = owners[value]
        if index == 0:
            raise ValueError(f"The region {name} has the value {value:g}, which is the background. Remove it.")
        absent = sorted(set(labels[index]) - set(values))  # type: ignore[call-overload]
        if absent:
            raise ValueError(
                f"The region {name} has the value {value:g} but not {absent[0]:g}, and labels puts both into class "
                f"{index}. Split that class, or give the region all of its values."
            )
