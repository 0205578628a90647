# SPDX-License-Identifier: Apache-2.0
"""Time the stages of an inference, from reading the files to writing the mask."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.transforms import Compose, Transform

from scripts.utils.atomic_files import write_json
from scripts.utils.markdown import markdown_table

# Class of a transform -> stage.
STAGES = {
    "GatherModalitiesd": "find the files",
    "LoadModalitiesd": "read, check, decompress",
    "CropToBoxd": "crop",
    "OntoGridd": "resample",
    "NormaliseModalityd": "normalise",
    "StackModalitiesd": "stack",
    "RestoreGridd": "decide, bring back",
    "SaveMaskd": "compress, write",
}
START, NETWORK, INFERER, REST = "start the engine", "network", "pad, windows, blend", "everything else"


class _TimedTransform(Transform):
    """A transform whose seconds are reported."""

    def __init__(self, inner: Callable[[Any], Any], add_seconds: Callable[[str, float], None]) -> None:
        self.inner, self.add_seconds = inner, add_seconds
        name = type(inner).__name__
        self.stage = STAGES.get(name, name)

    def __call__(self, data: Any) -> Any:
        began = time.perf_counter()
        result = self.inner(data)
        self.add_seconds(self.stage, time.perf_counter() - began)
        return result


class Profile:
    """Handler that times every stage of an evaluator, prints their shares and writes ``profile.json``.

    The engine is started before the first case and has its own row. The first call of the network includes the
    comparison with PyTorch.

    Args:
        preprocessing: transforms to time.
        postprocessing: transforms to time.
        output_dir: folder of ``profile.json``.
    """

    def __init__(self, preprocessing: Compose, postprocessing: Compose, output_dir: str) -> None:
        self.composed, self.output_dir = (preprocessing, postprocessing), output_dir
        self.seconds: dict[str, float] = {}
        self.cases, self.total, self.began = 0, 0.0, 0.0

    def attach(self, engine: Engine) -> None:
        """Register with an evaluator."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.begin_case)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.end_case)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add the seconds of one call to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def start(self, engine: Any) -> None:
        """Replace transforms, network and inferer by timed ones."""
        for composed in self.composed:
            composed.transforms = tuple(_TimedTransform(each, self.add_seconds) for each in composed.transforms)
        network, infer = engine.network, engine.inferer
        if hasattr(network, "choose"):
            began = time.perf_counter()
            network.choose()
            self.add_seconds(START, time.perf_counter() - began)

        def timed_network(image: Any) -> Any:
            began = time.perf_counter()
            result = network(image)
            self.add_seconds(NETWORK, time.perf_counter() - began)
            return result

        for name in ("window", "bytes_per_voxel"):  # attributes that the inferer reads
            if getattr(network, name, None) is not None:
                setattr(timed_network, name, getattr(network, name))

        def timed_inferer(inputs: Any, _: Any, *args: Any, **kwargs: Any) -> Any:
            began, network_seconds = time.perf_counter(), self.seconds.get(NETWORK, 0.0)
            result = infer(inputs, timed_network, *args, **kwargs)
            inside_network = self.seconds[NETWORK] - network_seconds
            self.add_seconds(INFERER, time.perf_counter() - began - inside_network)
            return result

        engine.inferer = timed_inferer

    def begin_case(self, engine: Engine) -> None:
        """Start the clock of a case."""
        self.began = time.perf_counter()

    def end_case(self, engine: Engine) -> None:
        """Stop the clock of a case."""
        self.total += time.perf_counter() - self.began
        self.cases += 1

    def finish(self, engine: Engine) -> None:
        """Print the table and write the file."""
        start_seconds = self.seconds.pop(START, None)
        self.add_seconds(REST, self.total - sum(self.seconds.values()))
        stages = [{"stage": name, "seconds": round(s, 4), "share": s / self.total} for name, s in self.seconds.items()]
        profile = {
            "cases": self.cases,
            "seconds": round(self.total, 4),
            "start_seconds": start_seconds,
            "stages": stages,
        }
        write_json(profile, Path(self.output_dir) / "profile.json")
        print(profile_table(profile))


def profile_table(profile: dict[str, Any]) -> str:
    """The contents of a ``profile.json`` as a Markdown table."""
    cases = profile["cases"]
    rows = [[row["stage"], f"{row['seconds'] / cases:.3f}", f"{row['share']:.0%}"] for row in profile["stages"]]
    rows.append(["all", f"{profile['seconds'] / cases:.3f}", f"{cases} case(s)"])
    if profile["start_seconds"] is not None:
        rows.append([f"{START} (once)", f"{profile['start_seconds']:.3f}", ""])
    return markdown_table(["stage", "s per case", "share"], rows)
