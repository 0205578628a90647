# SPDX-License-Identifier: Apache-2.0
"""The HTML report is self-contained, escaped, accessible and complete."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from scripts.metrics import aggregate, aggregate_regions
from scripts.report import Overlay, write_report
from scripts.report.page import TEMPLATES

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
    write_report(
        path, f"Title {EVIL} & more", runs, overlays, learning_curves(), manifest, notes=[f"Extra file {EVIL}"]
    )
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
    assert len(page.attributes("script")) == 1
    assert EVIL not in page.text
    assert page.texts("title") == page.texts("h1") == [f"Title {EVIL} & more"]
    assert EVIL in page.texts("td")
    assert f"Extra file {EVIL}" in page.texts("p")
    assert page.texts("figcaption")[0].startswith(f"worst case: {EVIL}Volume: ")


def test_the_content_security_policy_allows_the_one_script_by_its_hash(page) -> None:
    digest = base64.b64encode(hashlib.sha256(page.texts("script")[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.attributes("meta")[2]["content"]


def test_every_image_decodes_and_has_an_alternative_text(page) -> None:
    image_module = pytest.importorskip("PIL.Image")
    images = page.attributes("img")
    panels = 2 * 3 * 2  # cases, planes, modalities
    assert len(images) == 2 * panels + 2 + 1  # each with its outlines; loss and Dice, the terms of one run
    for attributes in images:
        kind, data = re.fullmatch(r"data:image/(png|webp);base64,(.+)", attributes["src"]).groups()
        with image_module.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            assert image.format.lower() == kind
            empty = ": pet," in attributes["alt"]  # an image of zeros
            assert (np.asarray(image.convert("L")).std() > 5) != empty
    alts = [attributes["alt"] for attributes in images]
    assert alts[1::2][:panels] == [""] * panels  # outlines: the legend describes them
    assert alts[0] == f"worst case: {EVIL}: ct, axial, outlines of reference and prediction"
    assert len(set(alts[0 : 2 * panels : 2])) == panels
    assert alts[-2] == r"Validation Dice by epoch; last values: _student $\foo$ 0.5"


def test_the_intended_use_is_stated_first_and_the_viewport_fits_a_phone(page) -> None:
    assert page.texts("p")[0] == (
        "For research only: not a medical device, "
        "not for diagnosis, treatment planning or any decision about a patient."
    )
    assert page.texts("h2")[0] == "Intended use and limits"
    assert len(page.texts("li")) == 4
    before = [tag for tag, _, _ in page.elements][: [tag for tag, _, _ in page.elements].index("p")]
    assert not {"table", "figure", "img"} & set(before)  # the statement comes first
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.attributes("meta")
    assert page.attributes("html") == [{"lang": "en"}]


def test_summary_shows_mean_interval_n_failures_and_costs(page) -> None:
    student, alone = page.rows(0)
    assert re.fullmatch(
        r"0\.533 \[0\.\d{3}, 0\.\d{3}\] \(3\)with failures0\.400 \[0\.\d{3}, 0\.\d{3}\] \(4\)", student[0]
    )
    assert re.match(r"4\.25 \[4\.25, 4\.25\] \(2\)with failures52\.12 \[", student[1])
    assert student[3:] == ["2 of 41 missed1 error", "2,500,000", "15.5", "0.81"]
    assert alone[:3] == [f"{mean} (1)with failures{mean} (1)" for mean in ("0.800", "4.25", "1.50")]
    assert alone[3:] == ["0 of 1", "\N{EN DASH}", "\N{EN DASH}", "\N{EN DASH}"]


def test_every_case_of_every_run_has_a_row_with_dashes_where_undefined(page) -> None:
    rows, dash = page.rows(1), "\N{EN DASH}"
    assert len(rows) == 5
    assert rows[0] == ["student", "a", "a", "ok", "0.900", "4.25", "1.50", "12.50", dash]
    assert rows[2] == ["student", "b", "b", "missed", "0.000", dash, dash, "12.50", dash]
    assert rows[3][3:5] == ["error", dash]
    assert rows[4][0] == f"alone {EVIL}"


def test_sortable_columns_have_buttons_and_exact_values(page) -> None:
    assert page.texts("button") == [
        *("Network", "Case", "Patient", "Status", "Dice", "HD95 mm", "ASSD mm", "Volume ml", "Reference ml")
    ]
    values = [a["data-value"] for a in page.attributes("td") if "data-value" in a]
    assert values[:5] == ["0.9", "4.25", "1.5", "12.5", ""]


def test_every_table_header_has_a_scope_and_every_control_a_name(page) -> None:
    headers = page.attributes("th")
    assert {a["scope"] for a in headers} == {"col", "row"}
    regions = [a for a in page.attributes("div") if a.get("role") == "region"]
    assert [a["aria-label"] for a in regions] == ["Summary", "Every case"]
    assert all(a["tabindex"] == "0" for a in regions)
    sliders = [a for a in page.attributes("input") if a["type"] == "range"]
    assert len(sliders) == 2 * 3
    assert len({a["id"] for a in sliders}) == len(sliders)
    assert {a["id"] for a in sliders} < {a.get("for") for a in page.attributes("label")}
    for slider, plane in zip(sliders, 2 * ["axial", "coronal", "sagittal"], strict=True):
        assert slider["aria-label"].startswith(f"{plane} slice of ")
        assert re.fullmatch(r"slice \d+ of (12|10|8)", slider["aria-valuetext"])


def test_the_volumes_of_the_drawn_cases_are_given_in_millilitres(page) -> None:
    box = 6 * 4 * 4 * 1.0 * 1.0 * 3.0 / 1000  # voxels times mm3
    assert page.texts("small").count(f"Volume: reference {box:.2f} ml, prediction {box:.2f} ml") == 2


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
    write_report(tmp_path / "r.html", "t", [], [alone], {}, {})
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.texts("h2") == ["Intended use and limits", "Volumes", "Slices", "Manifest"]
    assert page.rows(0) == [["0.29"]]
    assert "one <case>: prediction" in page.texts("th")
    assert "reference" not in page.texts("span")


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
        write_report(tmp_path / name, "t", [run("r", [case("a")])], [overlay()], learning_curves(), {})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_report_without_runs_or_figures_is_still_a_page(tmp_path) -> None:
    write_report(tmp_path / "r.html", "empty", [], [], {}, {"seed": 0})
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.texts("h2") == ["Intended use and limits", "Manifest"]


def test_without_matplotlib_and_pillow_the_tables_remain_and_the_page_says_why(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    write_report(tmp_path / "r.html", "t", [run("r", [case("a")])], [overlay()], learning_curves(), {})
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    for package in ("matplotlib", "PIL"):
        assert page.texts("p").count(f"No figures: {package} is not installed.") == 1
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
    assert len(packaged) == 6


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
