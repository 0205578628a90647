# SPDX-License-Identifier: Apache-2.0
"""The slice viewer of the report: chosen slices, orientation, scale, grey levels and outlines."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from scripts.report import Overlay, slice_figure
from scripts.report.page import TEMPLATES, render_report
from scripts.report.slice_figure import literal_text
from scripts.report.slice_frames import SIDE, STRIP_BYTES, grey_frame, image_strip, outline_frame
from scripts.report.slice_viewer import MAX_FRAMES, slice_indices
from scripts.utils.colours import REGION_COLOURS


def case(axcodes: str = "RAS") -> Overlay:
    """A box and its shifted copy on noise, stored on axes that point to ``axcodes``."""
    reference = np.zeros((12, 10, 8), dtype=np.uint8)
    reference[3:9, 2:6, 2:7] = 1
    image = np.random.default_rng(0).normal(size=reference.shape)
    volumes, step = [image, reference, np.roll(reference, 1, 0)], (1.0, 2.0, 3.0)
    if axcodes == "SLP":
        volumes = [np.flip(volume, (0, 1)).transpose(2, 0, 1) for volume in volumes]
        step = (3.0, 1.0, 2.0)
    return Overlay("a", {"ct": volumes[0]}, volumes[1], volumes[2], step, axcodes)


def page(overlay: Overlay) -> str:
    """What the page loads of the case."""
    text = render_report("", [], [overlay], {}, {})
    part = re.search(r'<script type="application/json" id="part-case0">(.*?)</script>', text)
    return json.dumps(json.loads(part[1]) | {"html": ""}) + json.loads(part[1])["html"]


def first_frames(html: str, kind: str) -> list[Any]:
    """Per plane the frame that is shown first, in grey levels (webp) or palette indices (png)."""
    frames = []
    for block in html.split('<div class="plane"')[1:]:
        count, current = (int(n) for n in re.search(r"--frames:(\d+);--current:(\d+)", block).groups())
        data = re.search(rf"data:image/{kind};base64,([^\"]+)", block)[1]
        strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        strip = strip[..., 0] if strip.ndim == 3 else strip
        width = strip.shape[1] // count
        assert (width, strip.shape[0]) == (SIDE, SIDE)
        frames.append(strip[:, current * width : (current + 1) * width])
    return frames


def test_the_same_anatomy_in_another_orientation_gives_the_same_page() -> None:
    assert page(case()) == page(case("SLP"))
    other = case("SLP")
    wrong = Overlay(other.title, other.images, other.reference, other.prediction, other.spacing, "ILP")
    assert page(case()) != page(wrong)


def test_frames_are_in_mm_and_show_the_largest_reference_area_in_radiological_view() -> None:
    image = np.zeros((6, 5, 4))
    image[4, 3, 2] = 1.0  # towards the patient's right, front and head
    drawn = Overlay("", {"ct": image}, image > 0, image > 0, (1.0, 2.0, 3.0), windows={"ct": (0, 1)})
    html = page(drawn)
    # Width and height in mm; the voxel's middle from the left and from the top, in voxels and in all.
    expected = [((6, 10), (1.5, 6), (1.5, 5)), ((6, 12), (1.5, 6), (1.5, 4)), ((10, 12), (3.5, 5), (1.5, 4))]
    for frame, (extent, across, down) in zip(first_frames(html, "webp"), expected, strict=True):
        width, height = (round(SIDE * length / max(extent)) for length in extent)
        rows, columns = np.nonzero(frame > 128)
        assert rows.mean() == pytest.approx((SIDE - height) / 2 + height * down[0] / down[1], abs=2)
        assert columns.mean() == pytest.approx((SIDE - width) / 2 + width * across[0] / across[1], abs=2)
    assert re.findall(r"slice (\d of \d)</output>", html) == ["3 of 4", "4 of 5", "2 of 6"]


def test_outlines_follow_the_border_of_the_mask_solid_or_dashed() -> None:
    mask = np.zeros((16, 16), dtype=bool)
    mask[2:10, 4:12] = True  # rows from the bottom
    pixels = SIDE // 16
    border = np.zeros((SIDE, SIDE), dtype=bool)
    border[SIDE - 10 * pixels : SIDE - 2 * pixels, 4 * pixels : 12 * pixels] = True
    border[SIDE - 10 * pixels + 2 : SIDE - 2 * pixels - 2, 4 * pixels + 2 : 12 * pixels - 2] = False
    solid = outline_frame(mask, (SIDE, SIDE))
    assert np.logical_xor(solid, border).sum() <= 4 * 40  # where bilinear edges are round
    dashed = outline_frame(mask, (SIDE, SIDE), dashed=True)
    assert 0.3 < dashed.sum() / solid.sum() < 0.7
    assert solid[dashed].all()


def test_a_slice_lies_in_the_middle_of_a_square() -> None:
    image = np.ones((10, 4))
    rows, columns = np.nonzero(grey_frame(image, (0, 1), (SIDE // 2, SIDE)))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, SIDE - 1, SIDE // 4, 3 * SIDE // 4 - 1)


def regions_case(axcodes: str = "RAS") -> Overlay:
    """Two regions, one in the other, and one that is empty."""
    plain = case(axcodes)
    axis = axcodes.index("S")
    masks = [mask * np.where(mask.cumsum(axis) > 2, 2, 1) for mask in (plain.reference, plain.prediction)]
    regions = {"whole <1>": [1, 2], "upper": [2], "none": [3]}
    return Overlay("a", plain.images, *masks, plain.spacing, axcodes, regions=regions)


def test_several_regions_have_a_colour_a_switch_and_outlines_each() -> None:
    html = page(regions_case())
    switches = re.findall(r'data-region="(\d)"> <svg.*?stroke="(#\w+)".*?</svg>(.*?)</label>', html)
    names = ("whole &lt;1&gt;", "upper", "none")
    assert switches == [(str(i), REGION_COLOURS[i], name) for i, name in enumerate(names)]
    assert re.findall(r'data-mask="(\w+)"> <svg.*?(stroke-dasharray)?>', html)
    strips = re.findall(r'data-mask="(\w+)" data-region="(\d)" alt="" src="data:image/png;base64,([^"]+)"', html)
    assert [strip[:2] for strip in strips] == [(m, r) for r in "012" for m in ("reference", "prediction")] * 3
    for _, number, data in strips:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))
        drawn = {tuple(colour) for colour in pixels[pixels[..., 3] > 0][:, :3].tolist()}
        colour = tuple(int(REGION_COLOURS[int(number)][i : i + 2], 16) for i in (1, 3, 5))
        assert drawn == (set() if number == "2" else {colour})


def test_one_region_is_drawn_like_a_mask_without_regions() -> None:
    plain = case()
    named = Overlay("a", plain.images, plain.reference, plain.prediction, plain.spacing, regions={"tumour": [1]})
    assert page(named) == page(plain)
    assert "data-region" not in page(plain)


def test_regions_in_another_orientation_give_the_same_page() -> None:
    assert page(regions_case()) == page(regions_case("SLP"))


def test_colours_of_regions_differ_and_are_light_enough_on_black() -> None:
    assert len(set(REGION_COLOURS)) == len(REGION_COLOURS)
    assert min(contrast(colour, "#000000") for colour in REGION_COLOURS) > 4.5


def test_a_lesion_smaller_than_a_pixel_is_outlined() -> None:
    cut = np.zeros((1024, 1024), dtype=bool)
    cut[300, 700] = True
    rows, columns = np.nonzero(outline_frame(cut, (256, 256)))
    assert len(rows) > 0
    assert abs(rows.mean() - (256 - 300 / 4)) < 2
    assert abs(columns.mean() - 700 / 4) < 2


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(20, 29, list(range(18, 32))), (None, None, list(range(3, 100, 5))), (10, 89, list(range(0, 100, 5)))],
)
def test_at_most_24_evenly_spaced_slices_reach_a_quarter_beyond_the_masks(
    first: Any, last: Any, expected: list[int]
) -> None:
    mask = np.zeros((4, 4, 100), dtype=bool)
    if first is not None:
        mask[1, 1, first : last + 1] = True
    indices = slice_indices({"prediction": mask}, 2)
    if first is None:  # the middle one of all is among them
        expected = list(range(50 % 5, 100, 5))
    assert indices == expected
    assert len(indices) <= MAX_FRAMES


@pytest.mark.parametrize("seed", range(5))
def test_the_slice_with_the_largest_area_is_always_shown(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((200, 90, 40)) < rng.uniform(0, 0.9, 200)[:, None, None]
    mask[: 10 * seed] = False
    largest = int(mask.sum((1, 2)).argmax())
    indices = slice_indices({"prediction": mask}, 0)
    assert largest in indices
    assert len(indices) <= MAX_FRAMES
    assert len(set(np.diff(indices))) == 1


def test_grey_levels_are_linear_within_the_window_and_clipped_outside() -> None:
    cut = np.array([[-300.0, -200.0, 50.0], [300.0, np.nan, np.inf]])
    grey = grey_frame(cut, (-200, 300), (3, 2))[127:129, 126:129]  # in the middle of the square
    np.testing.assert_array_equal(grey, [[255, 0, 255], [0, 0, 128]])  # the last row at the top


def test_the_window_is_the_given_one_or_percentiles_of_the_finite_values() -> None:
    image = np.arange(101.0).reshape(101, 1, 1)
    holed = np.concatenate([image, np.full((3, 1, 1), np.nan)])
    mask = np.zeros(holed.shape)
    drawn = Overlay("", {"ct": holed, "mr": holed, "pet": holed * np.nan}, None, mask, (1, 1, 1), "RAS", {"mr": (5, 7)})
    assert [drawn.window(name) for name in drawn.images] == [(1.0, 99.0), (5.0, 7.0), (0.0, 0.0)]


@pytest.mark.parametrize("value", [0.0, 7.0, np.nan])
def test_a_constant_image_is_black_or_white_and_an_empty_mask_has_no_outline(value: float) -> None:
    empty = np.zeros((6, 5, 4), dtype=bool)
    html = page(Overlay("", {"ct": np.full(empty.shape, value)}, empty, empty, (1, 1, 1)))
    assert all(len(np.unique(frame[100:156, 120:136])) == 1 for frame in first_frames(html, "webp"))
    assert not any(frame.any() for frame in first_frames(html, "png"))


def test_a_strip_of_noise_stays_below_the_size_limit() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (MAX_FRAMES, SIDE, SIDE)).astype(np.uint8)
    sizes = [len(base64.b64decode(image_strip(list(part)).partition(",")[2])) for part in (noise[:1], noise)]
    assert sizes[0] > 30_000  # one frame keeps its quality
    assert sizes[1] <= STRIP_BYTES < MAX_FRAMES * sizes[0]


def test_matplotlib_shows_run_names_literally() -> None:
    """matplotlib hides labels that start with an underscore and reads dollars as formulas."""
    assert literal_text("_a$b$") == r" _a\$b\$"


def test_the_slice_figure_has_a_panel_per_modality_and_both_outlines() -> None:
    figure = slice_figure(case())
    assert isinstance(figure, Figure)
    assert [axes.get_title() for axes in figure.axes] == ["ct"]
    assert len(figure.axes[0].collections) == 2
    assert figure.axes[0].images[0].get_extent() == [0, 12, 0, 20]


def luminance(colour: str) -> float:
    """Relative luminance of sRGB (WCAG 2)."""
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_reaches_a_contrast_of_4_5_on_every_background(scheme: int) -> None:
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", blocks[scheme]))
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # as published: just too low
    pairs = [(text, back) for text in ("ink", "quiet", "alarm") for back in ("paper", "head", "warn", "code")]
    assert {
        pair: contrast(*(colours[name] for name in pair))
        for pair in pairs
        if contrast(*(colours[name] for name in pair)) < 4.5
    } == {}
    assert contrast(colours["accent"], colours["paper"]) >= 3  # enough for lines and buttons


def test_the_viewer_joins_the_border_of_a_mask_to_closed_lines() -> None:
    """By Node.js: two squares of 2 x 1 and 1 x 1 voxels, which touch at a corner, have a line each."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node.js is not installed")
    script = (
        (TEMPLATES / "viewer.js").read_text()
        + """
        const voxels = new Set(["1,1", "2,1", "3,2"]), inside = (u, v) => voxels.has(`${u},${v}`);
        console.log(JSON.stringify(joined(contour(inside, 6, 6))));
    """
    )
    lines = json.loads(subprocess.run([node, "-e", script], capture_output=True, text=True, check=True).stdout)
    assert sorted(len(line) for line in lines) == [5, 7]  # an edge of each border voxel's side, and the first again
    assert all(line[0] == line[-1] for line in lines)
    assert all(abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1 for line in lines for a, b in itertools.pairwise(line))
