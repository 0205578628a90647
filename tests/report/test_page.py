# SPDX-License-Identifier: Apache-2.0
"""The HTML report is self-contained, escaped, accessible and complete."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re
import subprocess
import sys
import tomllib
import weakref
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from scripts.metrics import aggregate, aggregate_regions
from scripts.report import Overlay, write_report
from scripts.report.page import SCRIPTS, TEMPLATES

EVIL = "<script>alert('x')</script>"
VOID = {"meta", "img", "br", "input"}


class Page(HTMLParser):
    """Elements as ``(tag, attributes, text inside)``; open tags must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.elements: list[tuple[str, dict, list[str]]] = []
        self.open: list[int] = []
        self.feed(text)
        assert not self.open, [self.elements[i][0] for i in self.open]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag):
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data):
        for i in self.open:
            self.elements[i][2].append(data)

    def attributes(self, tag: str) -> list[dict]:
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def texts(self, tag: str) -> list[str]:
        return ["".join(text) for name, _, text in self.elements if name == tag]

    def part(self, name: str) -> dict:
        """What the page loads of a case, such as ``case0``; it lies in the page itself."""
        return json.loads(next("".join(x) for tag, a, x in self.elements if a.get("id") == f"part-{name}"))

    def case(self, number: int) -> Page:
        return Page(self.part(f"case{number}")["html"])

    def rows(self, table: int) -> list[list[str]]:
        tables = re.findall(r"<tbody>.*?</tbody>", self.text, flags=re.DOTALL)
        return [Page(f"<p>{row}</p>").texts("td") for row in re.findall(r"<tr>(.*?)</tr>", tables[table])]


def case(name: str, dice=0.8, hd95=4.25, assd=1.5, status="ok") -> dict:
    if status != "ok":
        dice, hd95, assd = (0.0 if status == "missed" else None), None, None
    row = {"case_id": name, "dice": dice, "hd95_mm": hd95, "assd_mm": assd, "status": status, "diagonal_mm": 100.0}
    return row | {"volume_ml": 12.5, "reference_volume_ml": None}


def run(name: str, rows: list[dict], **costs) -> dict:
    return {"name": name, "aggregate": aggregate(rows, resamples=50), "rows": rows, **costs}


def overlay(title: str = "median case: a") -> Overlay:
    reference = np.zeros((12, 10, 8), dtype=np.uint8)
    reference[3:9, 3:7, 2:6] = 1
    rng = np.random.default_rng(0)
    images = {"ct": rng.normal(size=reference.shape), "pet": np.zeros(reference.shape)}
    return Overlay(title, images, reference, np.roll(reference, 1, 0), (1.0, 1.0, 3.0))


def learning_curves() -> dict:
    rows = [{"epoch": e, "loss": 1 / e, "loss/dice": 0.5 / e, "loss/soft": 0.5 / e} for e in range(1, 5)]
    rows[1]["val_dice"], rows[3]["val_dice"] = 0.25, 0.5
    return {r"_student $\foo$": rows, "alone": [{"epoch": 1, "loss": 2.0, "val_dice": None}]}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    rows = [case("a", 0.9), case(EVIL, 0.7), case("b", status="missed"), case("c", status="error")]
    runs = [
        run("student", rows, parameters=2_500_000, gflops=15.53, seconds_per_case=0.812),
        run(f"alone {EVIL}", [case("a")], parameters=None),
    ]
    manifest = {"command": EVIL, "url": "https://example.org/x.js", "seed": 0, "path": Path("models") / "x.pt"}
    path = tmp_path_factory.mktemp("report") / "report.html"
    overlays = [overlay(f"worst case: {EVIL}"), overlay()]
    notes = [f"Extra file {EVIL}"]
    write_report(path, f"Title {EVIL} & more", runs, overlays, learning_curves(), manifest, notes, single_file=True)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_loads_nothing(page) -> None:
    for tag, attributes, _ in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    style = "".join(page.texts("style"))
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for a in page.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:")


def test_text_from_files_is_never_markup(page) -> None:
    assert [a.get("type", "") for a in page.attributes("script")] == [*2 * ["application/json"], ""]
    assert EVIL not in page.text
    assert page.texts("title") == page.texts("h1") == [f"Title {EVIL} & more"]
    assert EVIL in page.texts("td")
    assert f"Extra file {EVIL}" in page.texts("p")
    assert page.attributes("button")[0]["data-case"] == f"worst case: {EVIL}"
    assert EVIL not in page.part("case0")["html"]
    assert page.case(0).texts("h3") == [f"worst case: {EVIL}"]


def test_the_content_security_policy_allows_the_one_script_by_its_hash(page) -> None:
    digest = base64.b64encode(hashlib.sha256(page.texts("script")[-1].encode()).digest()).decode()
    assert page.attributes("meta")[2]["content"].endswith(f"script-src 'sha256-{digest}'")


def test_every_image_decodes_and_has_an_alternative_text(page) -> None:
    image_module = pytest.importorskip("PIL.Image")
    case = page.case(0)
    strips = [attributes for attributes in case.attributes("img") if attributes.get("class") != "outline"]
    outlines = [attributes for attributes in case.attributes("img") if attributes.get("class") == "outline"]
    assert len(strips) == 3 * 3  # planes; CT, PET, PET on CT
    assert [a["data-mask"] for a in outlines] == 3 * ["reference", "prediction"]  # which the page copies to every panel
    for attributes in [*strips, *outlines, *page.attributes("img")]:
        kind, data = re.fullmatch(r"data:image/(png|webp);base64,(.+)", attributes["src"]).groups()
        with image_module.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            assert image.format.lower() == kind
            empty = ": pet," in attributes["alt"]  # an image of zeros: only the ends of the frame differ
            assert (np.asarray(image.convert("L")).std() > 5) != empty or empty
    assert {attributes["alt"] for attributes in outlines} == {""}  # the legend describes them
    alts = [attributes["alt"] for attributes in strips]
    assert alts[0] == f"worst case: {EVIL}: ct, axial, outlines of reference and prediction"
    assert alts[2] == f"worst case: {EVIL}: PET on CT, axial, outlines of reference and prediction"
    assert len(set(alts)) == len(strips)
    figures = [attributes["alt"] for attributes in page.attributes("img")]
    assert len(figures) == 2 + 1  # loss and Dice, the terms of one run
    assert figures[1] == r"Validation Dice by epoch; last values: _student $\foo$ 0.5"


def test_the_intended_use_is_stated_first_and_the_viewport_fits_a_phone(page) -> None:
    assert page.texts("p")[0] == (
        "For research only: not a medical device, "
        "not for diagnosis, treatment planning or any decision about a patient."
    )
    assert page.texts("h2")[0] == "Intended use and limits"
    assert len(page.attributes("ul")) == 2  # limits; cases that cannot be drawn
    before = [tag for tag, _, _ in page.elements][: [tag for tag, _, _ in page.elements].index("p")]
    assert not {"table", "figure", "button"} & set(before)  # the statement comes first
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.attributes("meta")
    assert page.attributes("html") == [{"lang": "en"}]


def test_summary_shows_mean_interval_n_failures_and_costs(page) -> None:
    student, alone = page.rows(0)
    assert re.fullmatch(
        r"0\.533 \[0\.\d{3}, 0\.\d{3}\] \(3\)with failures0\.400 \[0\.\d{3}, 0\.\d{3}\] \(4\)", student[0]
    )
    assert re.match(r"4\.25 \[4\.25, 4\.25\] \(2\)with failures52\.12 \[", student[1])
    assert student[3:] == ["2 of 41 missed1 error", "2,500,000", "15.5", "0.81"]
    assert alone[:3] == ["0.800 (1)", "4.25 (1)", "1.50 (1)"]  # no failures, so nothing about them
    assert alone[3:] == ["0 of 1", "\N{EN DASH}", "\N{EN DASH}", "\N{EN DASH}"]


def test_every_case_of_every_run_has_a_row_with_dashes_where_undefined(page) -> None:
    rows, dash = page.rows(1), "\N{EN DASH}"
    assert len(rows) == 5
    assert rows[0] == ["student", "a", "a", "ok", "0.900", "4.25", "1.50", "12.50", dash]
    assert rows[2] == ["student", "b", "b", "missed", "0.000", dash, dash, "12.50", dash]
    assert rows[3][3:5] == ["error", dash]
    assert rows[4][0] == f"alone {EVIL}"


def test_sortable_columns_have_buttons_and_exact_values(page) -> None:
    titles = ["Network", "Case", "Patient", "Status", "Dice", "HD95 mm", "ASSD mm", "Volume ml", "Reference ml"]
    assert page.texts("button")[-len(titles) :] == titles
    values = [a["data-value"] for a in page.attributes("td") if "data-value" in a]
    assert values[:5] == ["0.9", "4.25", "1.5", "12.5", ""]


def test_every_table_header_has_a_scope_and_every_control_a_name(page) -> None:
    headers = page.attributes("th")
    assert {a["scope"] for a in headers} == {"col", "row"}
    regions = [a for a in page.attributes("div") if a.get("role") == "region"]
    assert [a["aria-label"] for a in regions] == ["Summary", "Every case"]
    assert all(a["tabindex"] == "0" for a in regions)
    case = page.case(1)
    sliders = [a for a in case.attributes("input") if a["type"] == "range" and "id" in a]
    assert len(sliders) == 3
    assert {a["id"] for a in sliders} == {f"case1-{plane}" for plane in ("axial", "coronal", "sagittal")}
    assert {a["id"] for a in sliders} < {a.get("for") for a in case.attributes("label")}
    for slider, plane in zip(sliders, ["axial", "coronal", "sagittal"], strict=True):
        assert slider["aria-label"].startswith(f"{plane} slice of ")
        assert re.fullmatch(r"slice \d+ of (12|10|8)", slider["aria-valuetext"])
    unnamed = [a for a in page.attributes("input") if a["type"] not in ("radio", "file", "text") and "id" not in a]
    assert unnamed == []  # radio buttons, the file and the reader lie in their labels


def test_the_volumes_of_the_drawn_cases_are_given_in_millilitres(page) -> None:
    box = 6 * 4 * 4 * 1.0 * 1.0 * 3.0 / 1000  # voxels times mm3
    for number in range(2):
        assert f"Volume: reference {box:.2f} ml, prediction {box:.2f} ml" in page.case(number).texts("span")


def test_centres_have_their_own_table_and_a_column_in_the_case_table(tmp_path) -> None:
    rows = [case("a", 0.9) | {"centre": "X<1>"}, case("b", 0.5) | {"centre": "Y"}, case("c", 0.7) | {"centre": "X<1>"}]
    write_report(tmp_path / "r.html", "t", [run("r", [*rows, case("d", status="missed")])], [], {}, {})
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "By centre" in page.texts("h2")
    names = [text for text in page.texts("th") if "case" in text]
    assert names[2:] == ["X<1>2 cases, 2 patients", "Y1 case, 1 patient", "not given1 case, 1 patient"]
    dice = [row[1] for row in page.rows(1)]
    assert re.match(r"0\.800 \[0\.700, 0\.900\] \(2\)", dice[0])
    assert dice[1].startswith("0.500 (1)")  # one patient: no interval
    assert [row[4] for row in page.rows(1)] == ["0 of 2", "0 of 1", "1 of 11 missed"]
    assert [row[3] for row in page.rows(2)] == ["X<1>", "Y", "X<1>", ""]
    assert page.texts("button")[3] == "Centre"


def test_several_regions_have_a_row_in_the_summary_and_a_table_of_cases_each(tmp_path) -> None:
    rows = [
        case(name, dice) | {"region": region} for name, dice in (("a", 0.9), ("b", 0.5)) for region in ("R<1>", "S")
    ]
    rows[3] |= case("b", status="missed")
    runs = [run("net", rows, regions=aggregate_regions(rows, resamples=50)), run("old", [case("a", 0.3)])]
    write_report(tmp_path / "r.html", "t", runs, [], {}, {})
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    heads = [text for text in page.texts("th") if "case" in text]
    assert heads[-4:] == [
        "net2 cases, 2 patients, 2 regions", "net: R<1>2 cases, 2 patients", "net: S2 cases, 2 patients",
        "old1 case, 1 patient",
    ]  # fmt: skip
    assert [row[0].split(" ")[0] for row in page.rows(0)] == ["0.575", "0.700", "0.450", "0.300"]
    assert page.texts("h2")[2:5] == ["Every case: R<1>", "Every case: S", "Every case: foreground"]
    assert [[row[:2] for row in page.rows(i)] for i in (1, 2, 3)] == [
        [["net", "a"], ["net", "b"]], [["net", "a"], ["net", "b"]], [["old", "a"]],
    ]  # fmt: skip
    assert page.rows(2)[1][3] == "missed"
    labels = [each["aria-label"] for each in page.attributes("div") if each.get("role") == "region"]
    assert labels == ["Summary", "Every case: R<1>", "Every case: S", "Every case: foreground"]


def test_the_volume_of_every_region_of_a_mask_is_listed(tmp_path) -> None:
    values = np.zeros((12, 10, 8), dtype=np.uint8)
    values[:4], values[:1] = 1, 2
    regions = {"whole": [1, 2], "core": [2]}
    alone = Overlay("case", {"ct": np.zeros(values.shape)}, None, values, (1.0, 1.0, 3.0), regions=regions)
    write_report(tmp_path / "r.html", "t", [], [alone], {}, {})
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.rows(0) == [[f"{4 * 80 * 3 / 1000:.2f}"], [f"{80 * 3 / 1000:.2f}"]]
    assert [text for text in page.texts("th") if "case" in text] == ["case: whole prediction", "case: core prediction"]


def test_several_networks_open_with_dice_by_parameters_and_their_differences(tmp_path) -> None:
    small = run("small", [case("a", 0.5), case("b", 0.7)], parameters=200_000)
    large = run("large", [case("a", 0.75), case("b", 0.75)], parameters=30_000_000)
    unknown = run("masks", [case("a", 0.5), case("b", 0.5)], parameters=None)
    write_report(tmp_path / "report.html", "Both", [small, large, unknown], [], {}, {}, baseline=small)
    page = Page((tmp_path / "report.html").read_text())
    (image,) = page.attributes("img")
    assert image["alt"] == "Dice by parameters, mean and 95% interval: small 0.20 M 0.600, large 30.00 M 0.750"
    assert page.texts("h2")[1:4] == ["Dice by parameters", "Summary", "Differences"]
    first, second = page.rows(1)  # 0.25 and 0.05; 0 and -0.2
    assert first[0].startswith("0.150 [")
    assert second[0].startswith("-0.100 [")


def test_evaluations_with_different_modalities_have_a_table_by_modalities(tmp_path) -> None:
    whole = run("net", [case("a", 0.9), case("b", 0.7)], present=["ct", "pet"])
    part = run("net (pet only)", [case("b", 0.6), case("a", 0.5)], present=["pet"])
    other = run("old", [case("a", 0.3)])  # without the key `present`
    write_report(tmp_path / "r.html", "t", [part, other, whole], [], {}, {})
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    first, second = page.rows(1)
    assert first[:3] == ["yes", "yes", "\N{EN DASH}"]
    assert second[:2] == ["no", "yes"]
    assert second[2] == "-0.250 [-0.400, -0.100] (2)"  # -0.4 and -0.1: each is drawn twice in some resample
    for runs in ([whole], [whole, {**whole, "name": "again"}], [whole, other]):
        write_report(tmp_path / "r.html", "t", runs, [], {}, {})
        assert "By modalities" not in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_mask_without_reference_is_listed_with_its_volume_and_without_scores(tmp_path) -> None:
    both = overlay("one <case>")
    alone = Overlay(both.title, both.images, None, both.prediction, both.spacing)
    write_report(tmp_path / "r.html", "t", [], [alone], {}, {}, single_file=True)
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.texts("h2") == ["Intended use and limits", "Volumes", "Cases", "Manifest"]
    assert page.rows(0) == [["0.29"]]
    assert "one <case>: prediction" in page.texts("th")
    keys = [a["data-mask"] for a in page.case(0).attributes("input") if "data-mask" in a]
    assert keys == ["prediction"]
    assert page.part("case0")["difference"] is None
    assert "prediction 0.29 ml" in page.texts("small")


def test_definitions_of_metrics_and_intervals_are_listed_once(page) -> None:
    terms = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert "95th percentiles" in terms["hd95_mm"]
    assert "50 resamples of the patients with replacement" in terms["ci95"]
    assert "seed 0" in terms["ci95"]
    assert len(page.texts("dt")) == len(terms)


def test_the_manifest_is_complete_json_in_a_collapsed_block(page) -> None:
    assert "open" not in page.attributes("details")[0]
    expected = {"command": EVIL, "url": "https://example.org/x.js", "seed": 0, "path": str(Path("models") / "x.pt")}
    assert json.loads(page.texts("pre")[0]) == expected


def test_the_same_input_writes_the_same_bytes(tmp_path) -> None:
    for name in "ab":
        write_report(tmp_path / name / "r.html", "t", [run("r", [case("a")])], [overlay()], learning_curves(), {})
    first, second = (sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in "ab")
    assert [path.name for path in first] == [path.name for path in second]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_cases_lie_in_a_folder_beside_the_page_and_those_of_an_earlier_page_are_removed(tmp_path) -> None:
    path, folder = tmp_path / "my report.html", tmp_path / "my report_files"
    write_report(path, "t", [], [overlay("one"), overlay("two")], {}, {})
    (folder / "own.txt").write_text("a file of the user")
    write_report(path, "t", [], [overlay("three")], {}, {})
    page = Page(path.read_text(encoding="utf-8"))
    (name,) = (a["data-file"] for a in page.attributes("button") if "data-file" in a)
    assert sorted(f"my%20report_files/{each.name}" for each in folder.iterdir()) == [name, "my%20report_files/own.txt"]
    part = (tmp_path / name.replace("%20", " ")).read_text()
    assert re.fullmatch(r'addReportPart\("case0", (\{.*\})\);\n', part)
    assert json.loads(part[len('addReportPart("case0", ') : -3])["case"] == "three"
    assert "<" not in part  # nothing that could be markup
    assert page.attributes("meta")[2]["content"].endswith("'strict-dynamic'")  # its script may load files
    write_report(path, "t", [], [overlay("three")], {}, {}, single_file=True)
    assert [each.name for each in folder.iterdir()] == ["own.txt"]
    assert "strict-dynamic" not in path.read_text()


def test_cases_are_read_one_after_the_other(tmp_path) -> None:
    alive = []

    def overlays():
        for name in "abc":
            each = overlay(name)
            alive.append(weakref.ref(each))
            yield each
            del each
            assert sum(reference() is not None for reference in alive) <= 1

    write_report(tmp_path / "r.html", "t", [], overlays(), {}, {})
    assert len(alive) == 3


def test_the_list_names_the_reason_of_each_case_and_the_rule(tmp_path) -> None:
    voxel_ml = 1.0 * 1.0 * 3.0 / 1000
    moved = overlay("moved")  # by 1 mm: two faces of 4 x 4 voxels
    mask = np.zeros(moved.prediction.shape, dtype=np.uint8)
    lost = dataclasses.replace(moved, title="lost", prediction=mask, dice=0.0)
    rows = [case("moved"), case("lost", status="missed"), case("gone", status="error") | {"findings": "it is empty"}]
    write_report(tmp_path / "r.html", "t", [run("net", rows)], [lost, moved], {}, {}, single_file=True)
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.texts("em") == ["missed part", "border"]
    details = [text for text in page.texts("small") if text.endswith(" ml")]
    assert details == [f"missed part {96 * voxel_ml:.2f} ml", f"border {2 * 16 * voxel_ml:.2f} ml"]
    assert any("within 3 mm of the other mask" in text for text in page.texts("p"))
    assert "net, gone: it is empty." in page.texts("li")


def test_the_measures_of_a_case_are_shown_with_it(tmp_path) -> None:
    rows = [
        {"case_id": "a", "lesion": "1", "volume_ml": 12.3456, "suvpeak": None, "tlg_g": None},
        {"case_id": "a", "lesion": "<2>", "volume_ml": 1200.5, "suvpeak": 4.5, "tlg_g": None},
        {"case_id": "not drawn", "lesion": "1", "volume_ml": 1.0, "suvpeak": 1.0, "tlg_g": 1.0},
    ]
    write_report(tmp_path / "r.html", "t", [], [overlay("a")], {}, {}, single_file=True, measures=rows)
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.case(0).texts("th") == ["lesion", "volume ml", "suvpeak"]
    assert page.case(0).rows(0) == [["1", "12.35", "\N{EN DASH}"], ["<2>", "1,200.50", "4.50"]]
    assert [text for text in page.texts("h2") if "Measures" in text] == ["Measures of not drawn"]


def test_the_form_of_a_review_names_the_mask_by_its_hash(tmp_path) -> None:
    mask = tmp_path / "a.nii.gz"
    mask.write_bytes(b"mask")
    named = dataclasses.replace(overlay("a"), mask_path=mask)
    write_report(tmp_path / "r.html", "t", [], [named], {}, {})
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    choice = page.attributes("button")[0]
    assert choice["data-mask"] == "a.nii.gz"
    assert choice["data-sha256"] == hashlib.sha256(b"mask").hexdigest()
    assert [a["data-review-file"] for a in page.attributes("div") if "data-review-file" in a] == ["r.review.json"]
    assert [a["value"] for a in page.attributes("input") if a["type"] == "radio"] == ["accept", "correct", "reject"]


def test_a_report_without_runs_or_figures_is_still_a_page(tmp_path) -> None:
    write_report(tmp_path / "r.html", "empty", [], [], {}, {"seed": 0})
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.texts("h2") == ["Intended use and limits", "Manifest"]


def test_without_matplotlib_and_pillow_the_tables_remain_and_the_page_says_why(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    runs = [run("r", [case("a")])]
    write_report(tmp_path / "r.html", "t", runs, [overlay()], learning_curves(), {}, single_file=True)
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.texts("p").count("No figures: matplotlib is not installed.") == 1
    assert page.case(0).texts("p").count("No figures: PIL is not installed.") == 1
    assert not page.attributes("img")
    assert len(page.rows(1)) == 1


def test_importing_the_report_imports_neither_matplotlib_nor_nibabel() -> None:
    code = "import sys, scripts.report; assert not {'matplotlib', 'nibabel', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_an_installed_package_contains_every_template() -> None:
    root = Path(__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = root / "scripts" / "report"
    packaged = {path for pattern in patterns["scripts.report"] for path in folder.glob(pattern)}
    assert packaged == {path for path in TEMPLATES.rglob("*") if path.is_file()}
    assert {path.name for path in packaged} >= {"page.html", "style.css", "tables.js", *SCRIPTS}


def test_a_failing_report_leaves_the_old_one(tmp_path) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")
    with pytest.raises(KeyError):
        write_report(path, "t", [{"name": "no aggregate"}], [], {}, {})
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prediction": np.zeros((12, 10, 9))}, r"share one grid, got shapes.*\(12, 10, 8\).*\(12, 10, 9\)"),
        ({"images": {"ct": np.zeros((1, 12, 10, 8))}}, r"share one grid.*'ct': \(1, 12, 10, 8\)"),
        ({"spacing": (1, 1, 0)}, "spacing must hold 3 finite positive values"),
    ],
)
def test_an_inconsistent_overlay_is_refused_by_its_title(changed, message) -> None:
    good = overlay("case 7")
    fields = {name: getattr(good, name) for name in ("images", "reference", "prediction", "spacing")}
    with pytest.raises(ValueError, match=f"case 7.*{message}"):
        Overlay("case 7", **(fields | changed))
