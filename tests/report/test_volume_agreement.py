# SPDX-License-Identifier: Apache-2.0
"""The plots of predicted against reference volumes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scripts.report.volume_agreement import HEIGHT, WIDTH, agreements, bland_altman


def row(case_id: str, predicted: float | None, reference: float | None, region: str = "") -> dict[str, Any]:
    return {"case_id": case_id, "volume_ml": predicted, "reference_volume_ml": reference, "region": region}


def test_bias_and_limits_of_agreement_are_those_of_bland_and_altman() -> None:
    # Differences 1, 3, -1, 1: mean 1, sample variance (0 + 4 + 4 + 0) / 3.
    bias, spread = bland_altman([11, 23, 29, 41], [10, 20, 30, 40])
    assert (bias, spread) == (1, pytest.approx(1.96 * np.sqrt(8 / 3)))
    assert bland_altman([5], [3]) == (2, None)


def test_a_network_has_a_scatter_and_a_bland_altman_plot_with_a_mark_per_case() -> None:
    rows = [row("a", 11, 10), row("b", 23, 20), row("c", 29, 30), row("d", 41, 40), row("e", None, 5)]
    (agreement,) = agreements([{"name": "net", "rows": rows}, {"name": "none", "rows": [row("a", None, 1)]}])
    assert agreement.text == (
        "Predicted minus reference volume: mean 1.00 ml, 95% limits of agreement -2.20 to 4.20 ml (4 volumes)."
    )
    scatter, difference = agreement.plots
    assert [mark.case_id for mark in scatter.marks] == ["a", "b", "c", "d"]
    assert scatter.marks[0].title == "a: predicted 11.00 ml, reference 10.00 ml"
    for plot in agreement.plots:
        ticks = {tick.text: tick.at for tick in plot.x_ticks}, {tick.text: tick.at for tick in plot.y_ticks}
        for mark in plot.marks:
            assert min(ticks[0].values()) <= mark.x <= max(ticks[0].values()) < WIDTH
            assert min(ticks[1].values()) <= mark.y <= max(ticks[1].values()) < HEIGHT
        assert list(ticks[0].values()) == sorted(ticks[0].values())
        assert list(ticks[1].values()) == sorted(ticks[1].values(), reverse=True)  # up
    places = {tick.text: tick.at for tick in scatter.x_ticks}
    assert scatter.marks[1].x == pytest.approx(places["20"], abs=0.1)
    levels = {line.css_class: line.y1 for line in difference.lines}
    assert levels["zero"] == pytest.approx({tick.text: tick.at for tick in difference.y_ticks}["0"], abs=0.1)
    assert difference.marks[0].y == pytest.approx(levels["mean"], abs=0.1)  # a difference of 1, as the mean


def test_regions_have_a_colour_each_and_one_region_has_none() -> None:
    rows = [row("a", 1, 2, "WT"), row("a", 1, 1, "ET")]
    (both,) = agreements([{"name": "net", "rows": rows}])
    assert [name for name, _ in both.regions] == ["WT", "ET"]
    assert [mark.colour for mark in both.plots[0].marks] == [colour for _, colour in both.regions]
    (one,) = agreements([{"name": "net", "rows": rows[:1]}])
    assert one.regions == []
    assert one.plots[0].marks[0].colour == ""


@pytest.mark.parametrize("volumes", [(0, 0), (0, 5), (5, 0), (1e-6, 1e-6), (123456, 99999)])
def test_any_volume_gives_a_picture(volumes: tuple[float, float]) -> None:
    (agreement,) = agreements([{"name": "net", "rows": [row("a", *volumes)]}])
    for plot in agreement.plots:
        assert 3 <= len(plot.x_ticks) <= 12
        assert 3 <= len(plot.y_ticks) <= 12
        assert len({tick.text for tick in plot.y_ticks}) == len(plot.y_ticks)
