# SPDX-License-Identifier: Apache-2.0
"""Where the time of an inference goes, from the files to the written mask."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.transforms import Compose, Transform

from scripts.utils.atomic_files import write_json

STAGES = {
    "GatherModalitiesd": "find the files",
    "LoadModalitiesd": "read, check, decompress",
    "CropToBoxd": "crop",
    "OntoGridd": "resample",
    "ScaleToUnitd": "normalise",
    "NormalizeIntensityd": "normalise",
    "StackModalitiesd": "stack",
    "RestoreGridd": "decide, bring back",
    "SaveMaskd": "compress, write",
}
START, NETWORK, INFERER, REST = "start the engine", "network", "pad, windows, blend", "everything else"


class _Timed(Transform):
    """A transform and a clock."""

    def __init__(self, inner: Callable[[Any], Any], note: Callable[[str, float], None]) -> None:
        self.inner, self.note = inner, note
        name = type(inner).__name__
        self.stage = STAGES.get(name, name)

    def __call__(self, data: Any) -> Any:
        began = time.perf_counter()
        result = self.inner(data)
        self.note(self.stage, time.perf_counter() - began)
        return result


class Profile:
    """Handler: time every stage of an evaluator, print their shares and write ``profile.json``.

    The engine is started before the first case, in a row of its own; its first call holds the comparison with PyTorch.

    Args:
        preprocessing, postprocessing: the transforms to time.
        output_dir: folder of ``profile.json``.
    """

    def __init__(self, preprocessing: Compose, postprocessing: Compose, output_dir: str) -> None:
        self.composed, self.output_dir = (preprocessing, postprocessing), output_dir
        self.seconds: dict[str, float] = {}
        self.cases, self.total, self.began = 0, 0.0, 0.0

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.end)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def note(self, stage: str, seconds: float) -> None:
        """Add to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def start(self, engine: Any) -> None:
        """Put a clock around everything."""
        for composed in self.composed:
            composed.transforms = tuple(_Timed(each, self.note) for each in composed.transforms)
        network, infer = engine.network, engine.inferer
        if hasattr(network, "choose"):
            began = time.perf_counter()
            network.choose()
            self.note(START, time.perf_counter() - began)

        def forward(image: Any) -> Any:
            began = time.perf_counter()
            result = network(image)
            self.note(NETWORK, time.perf_counter() - began)
            return result

        for name in ("window", "bytes_per_voxel"):  # what the inferer asks of a network
            if getattr(network, name, None) is not None:
                setattr(forward, name, getattr(network, name))

        def timed(inputs: Any, _: Any, *args: Any, **kwargs: Any) -> Any:
            began, inside = time.perf_counter(), self.seconds.get(NETWORK, 0.0)
            result = infer(inputs, forward, *args, **kwargs)
            self.note(INFERER, time.perf_counter() - began - (self.seconds[NETWORK] - inside))
            return result

        engine.inferer = timed

    def begin(self, engine: Engine) -> None:
        """A case begins."""
        self.began = time.perf_counter()

    def end(self, engine: Engine) -> None:
        """A case is done."""
        self.total += time.perf_counter() - self.began
        self.cases += 1

    def finish(self, engine: Engine) -> None:
        """Print the table and write the file."""
        start = self.seconds.pop(START, None)
        self.note(REST, self.total - sum(self.seconds.values()))
        rows = [{"stage": name, "seconds": round(s, 4), "share": s / self.total} for name, s in self.seconds.items()]
        found = {"cases": self.cases, "seconds": round(self.total, 4), "start_seconds": start, "stages": rows}
        write_json(found, Path(self.output_dir) / "profile.json")
        print(profile_table(found))


def profile_table(found: dict[str, Any]) -> str:
    """What ``profile.json`` holds, as Markdown."""
    lines = ["| stage | s per case | share |", "|---|---|---|"]
    for row in found["stages"]:
        lines.append(f"| {row['stage']} | {row['seconds'] / found['cases']:.3f} | {row['share']:.0%} |")
    lines.append(f"| all | {found['seconds'] / found['cases']:.3f} | {found['cases']} case(s) |")
    if found["start_seconds"] is not None:
        lines.append(f"| {START} (once) | {found['start_seconds']:.3f} | |")
    return "\n".join(lines)
