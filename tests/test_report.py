# SPDX-License-Identifier: Apache-2.0
"""The HTML report: self-contained, escaped, accessible, complete."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from scripts import report
from scripts.metrics import aggregate
from scripts.report import Overlay, pick_cases, write_report

EVIL = "<script>alert('x')</script>"
VOID = {"meta", "img", "br"}


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


def test_nothing_is_loaded_from_anywhere(page) -> None:
    for tag, attributes, _ in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    style = "".join(page.texts("style"))
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for a in page.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:")


def test_names_from_files_are_text_and_never_markup(page) -> None:
    assert len(page.attributes("script")) == 1
    assert EVIL not in page.text
    assert page.texts("title") == page.texts("h1") == [f"Title {EVIL} & more"]
    assert EVIL in page.texts("td")
    assert f"Extra file {EVIL}" in page.texts("p")
    assert f"worst case: {EVIL}" in page.texts("figcaption")


def test_the_only_script_is_the_one_that_the_policy_allows(page) -> None:
    digest = base64.b64encode(hashlib.sha256(page.texts("script")[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.attributes("meta")[2]["content"]


def test_every_image_has_an_alt_text_and_decodes(page) -> None:
    image_module = pytest.importorskip("PIL.Image")
    images = page.attributes("img")
    assert len(images) == 2 + 1 + 2  # loss and Dice, the terms of one run, two cases
    for attributes in images:
        assert len(attributes["alt"]) > 20
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", attributes["src"]).groups()
        with image_module.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            assert image.format.lower() == kind
            assert np.asarray(image.convert("L")).std() > 5
    alts = [attributes["alt"] for attributes in images]
    assert alts[1] == r"Validation Dice by epoch; last values: _student $\foo$ 0.5"
    assert alts[3].endswith("in three planes on ct, pet")


def test_the_page_says_that_it_is_for_research_only_and_fits_a_phone(page) -> None:
    assert "For research only, not for clinical use." in page.texts("p")[0]
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


def test_columns_sort_by_keyboard_and_by_exact_values(page) -> None:
    assert page.texts("button") == [
        *("Network", "Case", "Patient", "Status", "Dice", "HD95 mm", "ASSD mm", "Volume ml", "Reference ml")
    ]
    values = [a["data-value"] for a in page.attributes("td") if "data-value" in a]
    assert values[:5] == ["0.9", "4.25", "1.5", "12.5", ""]


def test_definitions_and_intervals_are_explained_once(page) -> None:
    terms = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert "95th percentiles" in terms["hd95_mm"]
    assert "50 resamples of the patients with replacement" in terms["ci95"]
    assert "seed 0" in terms["ci95"]
    assert len(page.texts("dt")) == len(terms)


def test_manifest_is_complete_json_in_a_collapsed_block(page) -> None:
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
    assert page.texts("h2") == ["Manifest"]


def test_without_matplotlib_the_tables_remain_and_the_page_says_why(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_report(tmp_path / "r.html", "t", [run("r", [case("a")])], [overlay()], learning_curves(), {})
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.texts("p").count("No figures: matplotlib is not installed.") == 2
    assert not page.attributes("img")
    assert len(page.rows(1)) == 1


def test_importing_the_report_imports_neither_matplotlib_nor_nibabel() -> None:
    code = "import sys, scripts.report; assert not {'matplotlib', 'nibabel'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


def test_run_names_are_shown_literally_in_legends() -> None:
    """matplotlib hides labels that start with an underscore and reads dollars as formulas."""
    assert report._plain("_a$b$") == r" _a\$b\$"


def test_a_failing_report_leaves_the_old_one(tmp_path) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")
    with pytest.raises(KeyError):
        write_report(path, "t", [{"name": "no aggregate"}], [], {}, {})
    assert path.read_text() == "old"


def test_pick_cases_takes_best_lower_median_and_worst_with_ties_by_case_id() -> None:
    rows = [case("d", 0.9), case("b", 0.9), case("e", 0.1), case("c", 0.1), case("x", status="error"), case("m", 0.5)]
    assert pick_cases(rows) == {"best": "b", "median": "m", "worst": "c"}
    assert pick_cases([case("a", 0.2), case("b", 0.4)]) == {"best": "b", "median": "a", "worst": "a"}
    assert pick_cases([case("a", status="true_negative")]) == pick_cases([]) == {}


def panels(drawn: Overlay) -> list:
    return [axes.images[0] for axes in report._overlay_figure(drawn).axes]


def test_the_same_anatomy_in_another_orientation_draws_the_same_panels() -> None:
    ras = overlay()
    turned = {name: np.flip(v, (0, 1)).transpose(2, 0, 1) for name, v in [*ras.images.items(), ("r", ras.reference)]}
    slp = Overlay("", {m: turned[m] for m in ras.images}, turned["r"], turned["r"], (3.0, 1.0, 1.0), "SLP")
    for one, other in zip(panels(ras), panels(slp), strict=True):
        np.testing.assert_array_equal(one.get_array(), other.get_array())
        assert one.get_extent() == other.get_extent()


def test_panels_are_in_mm_and_cut_the_largest_reference_area_in_radiological_view() -> None:
    image = np.zeros((6, 5, 4))
    image[4, 3, 2] = 1.0  # towards the patient's right, front and head
    reference = image > 0
    axial, coronal, sagittal = panels(Overlay("", {"ct": image}, reference, reference, (1.0, 2.0, 3.0)))
    assert [p.get_extent() for p in (axial, coronal, sagittal)] == [[0, 6, 0, 10], [0, 6, 0, 12], [0, 10, 0, 12]]
    assert np.argwhere(axial.get_array() > 0).tolist() == [[3, 1]]  # row from the bottom, column from the left
    assert np.argwhere(coronal.get_array() > 0).tolist() == [[2, 1]]
    assert np.argwhere(sagittal.get_array() > 0).tolist() == [[2, 3]]


def test_empty_masks_and_missing_modalities_are_drawn() -> None:
    empty = np.zeros((6, 5, 4), dtype=bool)
    assert len(panels(Overlay("", {"ct": np.full(empty.shape, 7), "mr": empty}, empty, empty, (1, 1, 1)))) == 6


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prediction": np.zeros((12, 10, 9))}, r"share one grid, got shapes.*\(12, 10, 8\).*\(12, 10, 9\)"),
        ({"images": {"ct": np.zeros((1, 12, 10, 8))}}, r"share one grid.*'ct': \(1, 12, 10, 8\)"),
        ({"spacing": (1, 1, 0)}, "spacing must hold 3 finite positive values"),
    ],
)
def test_an_overlay_that_does_not_fit_is_refused_by_title(changed, message) -> None:
    good = overlay("case 7")
    fields = {name: getattr(good, name) for name in ("images", "reference", "prediction", "spacing")}
    with pytest.raises(ValueError, match=f"case 7.*{message}"):
        Overlay("case 7", **(fields | changed))
