# SPDX-License-Identifier: Apache-2.0
"""The report in Chromium: no errors, tables sort, cases open, slices change, reviews are saved, it fits a phone.

The tests drive Chromium by its DevTools protocol over two pipes, so that only Chromium has to be installed. Those of
the viewer need `make viewer` too, and are skipped without it.
"""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image
from scipy.ndimage import binary_erosion

from scripts.evaluation.compare import compare
from scripts.evaluation.score import score
from scripts.report import Overlay, write_report
from scripts.report.volume_payload import LIBRARY

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), "")
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--remote-debugging-pipe",
    # A picture holds whole images only, however busy the machine is.
    "--disable-checker-imaging", "--run-all-compositor-stages-before-draw", "--disable-new-content-rendering-timeout",
]  # fmt: skip
WITH_WEBGL = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]  # without a GPU
WITHOUT_WEBGL = ["--disable-3d-apis"]
# Chromium reads commands from file descriptor 3 and writes answers to 4.
START = "import os, sys; a = sys.argv; os.dup2(int(a[1]), 3); os.dup2(int(a[2]), 4); os.execv(a[3], a[3:])"
EVIL = "<script>alert(1)</script>"
WIDTHS = {"phone": 390, "tablet": 820, "desktop": 1400}
# Of every visible element with its own text: the text, its colour and its background colour.
COLOURS = """[...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && !["SCRIPT", "OPTION"].includes(
  e.tagName) && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
  let back = e; while (back && getComputedStyle(back).backgroundColor === "rgba(0, 0, 0, 0)") back = back.parentElement;
  return [e.textContent.slice(0, 40), getComputedStyle(e).color, getComputedStyle(back || document.documentElement)
    .backgroundColor]; })"""


class Browser:
    """One page of a headless Chromium; ``errors`` lists errors and warnings, ``loaded`` the requested URLs."""

    def __init__(self, profile: Path, flags: Sequence[str] = WITHOUT_WEBGL) -> None:
        ours, theirs = os.pipe(), os.pipe()
        passed = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (ours[0], theirs[1])]  # neither 3 nor 4
        command = [
            sys.executable,
            "-c",
            START,
            *map(str, passed),
            CHROMIUM,
            *FLAGS,
            *flags,
            f"--user-data-dir={profile}",
        ]
        self.process = subprocess.Popen(command, pass_fds=passed, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for end in (ours[0], theirs[1], *passed):
            os.close(end)
        self.commands, self.answers = os.fdopen(ours[1], "wb", buffering=0), os.fdopen(theirs[0], "rb")
        self.number, self.session, self.rest = 0, "", b""
        self.errors: list[str] = []
        self.loaded: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            data = self.answers.read1(1 << 20)
            assert data, "Chromium has ended"
            self.rest += data
        text, _, self.rest = self.rest.partition(b"\0")
        return json.loads(text)  # type: ignore[no-any-return]

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.errors.append(f"dialog: {params['message']}")
        elif method == "Network.requestWillBeSent":
            self.loaded.append(params["request"]["url"])

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command of the protocol and return its result."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": params}
        command |= {"sessionId": self.session} if self.session else {}
        self.commands.write(json.dumps(command).encode() + b"\0")
        while (message := self._message()).get("id") != self.number:
            self._note(message)
        assert "error" not in message, (method, message)
        return message["result"]  # type: ignore[no-any-return]

    def run(self, code: str) -> Any:
        """Evaluate a JavaScript expression; wait for a promise."""
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, path: Path, width: int = 1280, height: int = 900) -> None:
        """Load a file in a window of this size."""
        self.errors.clear()
        self.loaded.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=path.as_uri())
        self.run("new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))")
        self.wait()

    def wait(self) -> None:
        """Wait until the chosen case is shown."""
        self.run("""new Promise(done => { const look = () => { const reading = document.querySelector('.reading');
          if (reading && (!reading.dataset.opened || document.querySelector('.loading').textContent.startsWith('Load')))
            setTimeout(look, 30); else requestAnimationFrame(() => requestAnimationFrame(done)); }; look(); })""")
        self.run("Promise.all([...document.images].map(image => image.decode()))")

    def open_case(self, number: int) -> None:
        """Choose a case in the list."""
        self.run("delete document.querySelector('.reading').dataset.opened")
        self.click(f"#case{number}")
        self.wait()

    def key(self, key: str, code: int) -> None:
        """Press and release one key, as on a keyboard."""
        named = {"key": key, "code": key, "windowsVirtualKeyCode": code, **({"text": "\r"} if key == "Enter" else {})}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **named)

    def type(self, text: str) -> None:
        """Type text into the focused element."""
        self.call("Input.insertText", text=text)

    def text(self, selector: str) -> str:
        """Text of an element."""
        return str(self.run(f"document.querySelector('{selector}').textContent"))

    def click(self, selector: str) -> None:
        """Click on the middle of an element with the mouse."""
        self.run(f"document.querySelector('{selector}').scrollIntoView({{block: 'center'}})")
        rect = f"document.querySelector('{selector}').getBoundingClientRect()"
        x, y = self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({rect})")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, selector: str = "body") -> bytes:
        """PNG of an element, including what lies outside of the window."""
        rect = f"document.querySelector('{selector}').getBoundingClientRect()"
        box = self.run(f"(r => [r.x + scrollX, r.y + scrollY, r.width, r.height])({rect})")
        clip = dict(zip(("x", "y", "width", "height"), box, strict=True)) | {"scale": 1}
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        return base64.b64decode(data)

    def close(self) -> None:
        """End the browser."""
        self.commands.close()
        self.answers.close()
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser without WebGL: still images are shown."""
    yield from started(tmp_path_factory.mktemp("profile"), WITHOUT_WEBGL)


@pytest.fixture(scope="module")
def gl_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser with WebGL, computed on the CPU."""
    if not LIBRARY.is_file():
        pytest.skip(f"{LIBRARY} is missing: make viewer")
    yield from started(tmp_path_factory.mktemp("profile"), WITH_WEBGL)


def started(profile: Path, flags: Sequence[str]) -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    opened = Browser(profile, flags)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(phantoms: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two evaluations of phantoms: two centres, one failure, one patient id that is markup."""
    return written_page(phantoms, tmp_path_factory.mktemp("report"))


def written_page(phantoms: list[dict[str, Any]], folder: Path, single_file: bool = False) -> Path:
    cases = [{**case, "centre": ("North", f"{EVIL} South")[i % 2]} for i, case in enumerate(phantoms)]
    cases[0]["patient_id"] = EVIL
    intensity = {"ct": [-200, 300], "pet": [0, 10], "mr": [0, 1200]}
    for run, (move, present) in enumerate(((1, None), (3, ["pet"]))):
        masks = folder / str(run) / "masks"
        masks.mkdir(parents=True)
        for i, case in enumerate(cases):
            label = sitk.ReadImage(case["label"])
            voxels = np.roll(sitk.GetArrayFromImage(label), move * (i % 3), 2)
            voxels = binary_erosion(voxels) if i % 2 else voxels
            mask = sitk.GetImageFromArray((voxels * (i != 5)).astype(np.uint8))
            mask.CopyInformation(label)
            sitk.WriteImage(mask, str(masks / f"{case['case_id']}.nii.gz"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("scripts.evaluation.score.case_overlays", lambda *arguments: [])
            score("student", cases, [[0], [1]], str(masks), str(masks.parent), intensity, workers=1, present=present)
    compare(
        [str(folder / "0"), str(folder / "1")], str(folder / "both"), cases, intensity, title="Student on phantoms",
        single_file=single_file,
    )  # fmt: skip
    return folder / "both" / "report.html"


@pytest.fixture
def opened(browser: Browser, page: Path) -> Iterator[Browser]:
    """The report in a desktop window; after each test there must be no error and no request to the network."""
    browser.open(page)
    yield browser
    assert_quiet(browser)


def assert_quiet(browser: Browser) -> None:
    """No error, and no request to a network; a slow computed WebGL is no error."""
    assert [error for error in browser.errors if "GL Driver Message (OpenGL, Performance" not in error] == []
    assert {url.partition(":")[0] for url in browser.loaded} <= {"file", "data", "blob"}


def column(browser: Browser, number: int) -> list[str]:
    """The texts of a column of the table of all cases."""
    return browser.run(f"[...document.querySelectorAll('.sortable tbody tr')].map(r => r.cells[{number}].textContent)")


def test_a_faulty_page_is_detected(browser: Browser, tmp_path: Path) -> None:
    """``errors == []`` of the other tests can fail: a blocked image, a script without its hash, an exception."""
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; script-src 'sha256-AAAA'\">"
    bad = {"image": f"{policy}<img src='https://localhost/x.png'>", "script": f"{policy}{EVIL}"}
    bad["exception"] = "<script>nothing.at.all()</script>"
    for name, text in bad.items():
        path = tmp_path / f"{name}.html"
        path.write_text(text)
        browser.errors.clear()
        browser.call("Page.navigate", url=path.as_uri())
        browser.run("new Promise(done => setTimeout(done, 300))")
        assert browser.errors, name


def test_markup_in_names_stays_text(opened: Browser) -> None:
    assert EVIL in column(opened, 2)
    assert f"{EVIL} South" in column(opened, 3)
    assert opened.run("[...document.scripts].filter(script => !script.src).length") == 1


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_pressing_a_column_title_sorts_by_exact_values_in_both_directions(opened: Browser, by: str) -> None:
    dice, header = 5, "document.querySelectorAll('.sortable th')[5]"
    before = column(opened, dice)
    assert opened.run(f"{header}.textContent") == "Dice"
    assert opened.run(f"{header}.ariaSort") is None
    expected = sorted(before, key=float)
    assert before not in (expected, expected[::-1])
    for direction, values in (("ascending", expected), ("descending", expected[::-1])):
        if by == "mouse":
            opened.click(".sortable th:nth-child(6) button")
        else:
            opened.run(f"{header}.firstElementChild.focus()")
            opened.key("Enter", 13)
        assert column(opened, dice) == values
        assert opened.run(f"{header}.ariaSort") == direction
    opened.click(".sortable th:nth-child(7) button")  # HD95: undefined for the two failures
    assert column(opened, 6)[-2:] == ["\N{EN DASH}"] * 2
    assert opened.run("document.querySelectorAll('.sortable [aria-sort]').length") == 1


@pytest.mark.parametrize("number", [0, 1, 2], ids=["axial", "coronal", "sagittal"])
def test_arrow_keys_on_a_slider_change_the_slice_and_announce_its_number(opened: Browser, number: int) -> None:
    opened.run("document.querySelector('.show-cross').click()")
    plane = f".plane:nth-of-type({number + 1})"
    slider = f"document.querySelector('{plane} input')"
    indices = opened.run(f"document.querySelector('{plane}').dataset.indices").split()
    opened.run(f"{slider}.focus()")
    opened.key("Home", 36)
    seen = []
    for index in indices[:3]:
        announced, shown = opened.run(f"[{slider}.ariaValueText, document.querySelector('{plane} output').textContent]")
        assert announced == shown
        assert announced.startswith(f"slice {int(index) + 1} of ")
        seen.append(opened.picture(f"{plane} .frame"))
        opened.key("ArrowRight", 39)
    assert len(set(seen)) == 3
    opened.key("Home", 36)
    assert opened.picture(f"{plane} .frame") == seen[0]


def test_the_slider_shows_the_frame_of_its_position(opened: Browser) -> None:
    for box in (".show-cross", ".key [data-mask=reference]", ".key [data-mask=prediction]"):
        opened.run(f"document.querySelector('{box}').click()")
    source = opened.run("document.querySelector('.frame img').src")
    strip = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("L")
    count = len(opened.run("document.querySelector('.plane').dataset.indices").split())
    opened.run("document.querySelectorAll('.frame i, .frame .scale').forEach(letter => letter.remove())")
    differences = []
    for at in range(count):
        moved = f"s => {{ s.value = {at}; s.dispatchEvent(new Event('input')); }}"
        opened.run(f"({moved})(document.querySelector('.plane input'))")
        shown = Image.open(io.BytesIO(opened.picture(".frame"))).convert("L")
        width = strip.width // count
        frames = [strip.crop((i * width, 0, (i + 1) * width, strip.height)).resize(shown.size) for i in range(count)]
        distance = [float(np.abs(np.asarray(shown, int) - np.asarray(frame, int)).mean()) for frame in frames]
        differences.append(int(np.argmin(distance)))
    assert differences == list(range(count))


def test_outlines_can_be_hidden_one_by_one_and_made_transparent(opened: Browser) -> None:
    def colourful() -> int:
        pixels = np.asarray(Image.open(io.BytesIO(opened.picture(".frame"))).convert("RGB"), dtype=int)
        return int((np.ptp(pixels, axis=2) > 60).sum())

    opened.open_case(3)
    opened.run("document.querySelector('.show-cross').click()")
    both = colourful()
    opened.click(".key [data-mask=reference]")
    assert 50 < colourful() < both
    opened.click(".key [data-mask=prediction]")
    assert colourful() == 0
    opened.click(".key [data-mask=prediction]")
    opened.run("(s => { s.value = 10; s.dispatchEvent(new Event('input')); })(document.querySelector('.opacity'))")
    assert colourful() == 0
    assert opened.run("[...document.querySelectorAll('.outline')].every(o => o.style.opacity === '0.1')")


def test_every_panel_shows_the_outlines_of_its_plane_and_has_the_same_size(opened: Browser) -> None:
    counts = opened.run("[...document.querySelectorAll('.frame')].map(f => f.querySelectorAll('.outline').length)")
    assert counts == [2] * 3 * 4  # both masks; planes; CT, PET, MR and PET on CT
    sizes = opened.run("[...document.querySelectorAll('.frame')].map(f => [f.clientWidth, f.clientHeight])")
    assert len({tuple(size) for size in sizes}) == 1


def test_the_worst_case_opens_and_the_list_the_buttons_and_the_plot_open_others(opened: Browser) -> None:
    names = opened.run("[...document.querySelectorAll('.choice b')].map(b => b.textContent)")
    dice = opened.run("[...document.querySelectorAll('.choice span')].map(s => parseFloat(s.textContent.slice(5)))")
    assert dice == sorted(dice)
    assert opened.text(".choice em") == "missed part"
    assert opened.text(".case-head h3") == names[0] == "PHANTOM_006"
    opened.open_case(2)
    assert opened.text(".case-head h3") == names[2]
    assert opened.run("document.querySelector('.choice[aria-current]').id") == "case2"
    assert opened.run("document.activeElement.className") == "case"  # where the keyboard goes on
    opened.click(".next")
    opened.wait()
    assert opened.text(".case-head h3") == names[3]
    opened.click(".previous")
    opened.wait()
    assert opened.text(".case-head h3") == names[2]
    mark = opened.run("document.querySelectorAll('.plot a')[1].dataset.case")
    opened.run("document.querySelectorAll('.plot a')[1].focus()")
    opened.key("Enter", 13)
    opened.wait()
    assert opened.text(".case-head h3") == mark
    assert "suvmax" in opened.text(".case-rest table")  # its measures


def test_a_case_is_loaded_when_it_is_opened(opened: Browser) -> None:
    def files() -> set[str]:
        return {url.rpartition("/")[2].partition("_")[0] for url in opened.loaded if url.endswith(".js")}

    assert files() == {"case0"}
    opened.open_case(4)
    assert files() == {"case0", "case4"}


def test_the_cross_hair_tells_its_place_as_simpleitk_does(opened: Browser, phantoms: list[dict[str, Any]]) -> None:
    label = sitk.ReadImage(phantoms[5]["label"])  # PHANTOM_006: stored as left, posterior, superior
    assert label.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    opened.run(
        "document.querySelectorAll('.plane input').forEach(s => { s.value = 3; s.dispatchEvent(new Event('input')); })"
    )
    z, y, x = (
        int(opened.run(f"document.querySelectorAll('.plane')[{n}].dataset.indices").split()[3]) for n in range(3)
    )
    place = label.TransformIndexToPhysicalPoint((x, label.GetSize()[1] - 1 - y, z))
    text = opened.text(".position output").replace("\N{MINUS SIGN}", "-")
    found = [float(re.search(rf"{name} (-?[\d.]+) mm", text)[1]) for name in ("sagittal x", "coronal y", "axial z")]
    np.testing.assert_allclose(found, place, atol=0.051)
    letter = "R" if place[0] < 0 else "L"
    assert f"Cross-hair {letter} {abs(place[0]):.1f}, " in text
    assert f"({z + 1} of {label.GetSize()[2]})" in text


def test_a_click_moves_the_cross_hair_in_the_other_planes(opened: Browser) -> None:
    before = opened.text(".position output")
    opened.click(".plane:nth-of-type(1) .panel:nth-of-type(2) .frame")  # its middle
    assert opened.text(".position output") != before
    sliders = opened.run("[...document.querySelectorAll('.plane')].map(p => Number(p.querySelector('input').value))")
    counts = opened.run("[...document.querySelectorAll('.plane')].map(p => p.dataset.sliceCount)")
    indices = opened.run("[...document.querySelectorAll('.plane')].map(p => p.dataset.indices)")
    for plane in (1, 2):  # coronal and sagittal: the frame that is nearest to the middle of the volume
        offered = np.array(indices[plane].split(), dtype=int)
        assert sliders[plane] == np.abs(offered - (int(counts[plane]) - 1) / 2).argmin()


def test_the_largest_difference_is_gone_to(opened: Browser) -> None:
    opened.open_case(1)
    before = opened.text(".position output")
    opened.click(".to-difference")
    assert opened.text(".position output") != before


def test_a_review_is_saved_as_a_file_and_loaded_again(opened: Browser, page: Path, tmp_path: Path) -> None:
    opened.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    opened.click("[name=decision][value=correct]")
    opened.run("document.querySelector('[name=note]').focus()")
    opened.type("upper part <b>")
    opened.run("document.querySelector('[name=reader]').focus()")
    opened.type("A. Reader")
    opened.open_case(1)
    assert opened.run("document.querySelector('[name=note]').value") == ""
    opened.run("document.querySelector('[name=decision][value=accept]').focus()")
    opened.key(" ", 32)
    assert opened.text(".progress") == "2 of 6 decided. Not saved."
    assert opened.text("#case0 .decision") == "correct, note"
    opened.click(".save")
    path = tmp_path / "report.review.json"
    for _ in range(100):
        if path.is_file():
            break
        time.sleep(0.05)
    review = json.loads(path.read_text())
    assert opened.text(".progress") == "2 of 6 decided."
    assert review["format"] == "segmentation-review/1"
    assert (review["report"], review["reader"]) == ("Student on phantoms", "A. Reader")
    assert [case["decision"] for case in review["cases"]] == ["correct", "accept", None, None, None, None]
    mask = page.parents[1] / "0" / "masks" / "PHANTOM_006.nii.gz"
    assert review["cases"][0] == {
        "case_id": "PHANTOM_006", "decision": "correct", "note": "upper part <b>", "mask": mask.name,
        "mask_sha256": hashlib.sha256(mask.read_bytes()).hexdigest(),
    }  # fmt: skip
    opened.open(page)
    assert opened.text(".progress") == "0 of 6 decided."
    review["cases"][2].update(mask_sha256="0" * 64, decision="reject")
    path.write_text(json.dumps(review))
    node = opened.call("Runtime.evaluate", expression="document.querySelector('.load input')")["result"]["objectId"]
    opened.call("DOM.setFileInputFiles", files=[str(path)], objectId=node)
    opened.run("new Promise(done => setTimeout(done, 300))")
    changed = opened.text("#case2 b")
    assert opened.text(".progress") == f"3 of 6 decided. The mask has changed since: {changed}."
    assert opened.run("document.querySelector('[name=note]').value") == "upper part <b>"
    path.write_text("{}")
    opened.call("DOM.setFileInputFiles", files=[str(path)], objectId=node)
    opened.run("new Promise(done => setTimeout(done, 300))")
    assert "report.review.json is no review of this format." in opened.text(".progress")


def test_a_missing_folder_is_told(browser: Browser, page: Path, tmp_path: Path) -> None:
    alone = tmp_path / "report.html"
    alone.write_bytes(page.read_bytes())
    browser.open(alone)
    assert browser.text(".loading").endswith("cannot be loaded. Keep the folder beside this page.")
    browser.errors.clear()


def test_one_file_shows_the_same_without_loading_any(
    browser: Browser, phantoms: list[dict[str, Any]], tmp_path: Path
) -> None:
    browser.open(written_page(phantoms, tmp_path, single_file=True))
    browser.open_case(3)
    assert browser.run("document.querySelectorAll('.frame').length") == 12
    assert [url for url in browser.loaded if url.endswith(".js")] == []
    assert_quiet(browser)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_a_contrast_of_at_least_4_5(opened: Browser, scheme: str) -> None:
    opened.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def luminance(colour: str) -> float:
        srgb = np.array([float(n) for n in colour[colour.index("(") + 1 : -1].split(",")][:3]) / 255
        linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    texts = opened.run(COLOURS)
    opened.call("Emulation.setEmulatedMedia", features=[])
    assert len(texts) > 150
    low = {}
    for text, *colours in texts:
        bright, dark = sorted(map(luminance, colours), reverse=True)
        if (ratio := (bright + 0.05) / (dark + 0.05)) < 4.5:
            low[text] = (ratio, colours)
    assert low == {}
    ink = luminance(texts[0][1])
    assert ink < 0.1 if scheme == "light" else ink > 0.5


@pytest.mark.parametrize("name", WIDTHS)
def test_the_page_fits_the_width_of_the_screen(browser: Browser, page: Path, name: str) -> None:
    browser.open(page, WIDTHS[name])
    assert browser.run("[innerWidth, document.documentElement.scrollWidth]") == [WIDTHS[name]] * 2
    assert browser.run("document.querySelector('.sortable').scrollWidth") > 500  # which scrolls in its own region
    assert browser.run("getComputedStyle(document.querySelector('.scroll')).overflowX") == "auto"
    sizes = browser.run("[...document.querySelectorAll('.frame')].map(f => f.getBoundingClientRect().width)")
    assert min(sizes) >= 120
    buttons = browser.run("[...document.querySelectorAll('.case button')].map(b => b.getBoundingClientRect().height)")
    assert min(height for height in buttons if height) >= 24  # WCAG 2.2: the smallest target
    assert browser.run("parseFloat(getComputedStyle(document.querySelector('td')).fontSize)") >= 14
    picture = Path(__file__).parents[2] / "runs" / "browser" / f"report_{name}.png"  # to be looked at
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(browser.picture())
    assert Image.open(picture).width == WIDTHS[name]
    assert browser.errors == []


def test_every_control_can_be_reached_by_the_tab_key_and_shows_its_focus(opened: Browser) -> None:
    opened.run("document.activeElement.blur(), scrollTo(0, 0)")
    focused = """(e => [e.id || e.className || e.name || e.dataset.mask || e.tagName, getComputedStyle(e).outlineStyle,
      Boolean(e.closest('.load, .plot'))])(document.activeElement)"""  # of the last two, something else is drawn
    seen = []
    for _ in range(60):
        opened.key("Tab", 9)
        seen.append(opened.run(focused))
    names = [name for name, *_ in seen]
    order = [
        "case0",
        "case5",
        "save",
        "show-cross",
        "reference",
        "opacity",
        "case0-axial",
        "case0-sagittal",
        "decision",
    ]
    assert [names.index(name) for name in order] == sorted(names.index(name) for name in order)
    invisible = {name for name, style, other in seen if style == "none" and not other}
    assert invisible <= {"BODY"}  # after the last element


def test_the_page_and_its_cases_are_small(page: Path) -> None:
    assert page.stat().st_size < 200_000
    sizes = [path.stat().st_size for path in (page.parent / "report_files").iterdir()]
    assert len(sizes) == 6
    assert max(sizes) < 1e6


# The viewer


@pytest.fixture
def viewer_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images with a bright box, to the left, to anterior and to superior, that the reference outlines exactly."""
    monkeypatch.setenv("REPORT_VIEWER", str(LIBRARY))
    box = np.zeros((40, 30, 20), dtype=np.uint8)
    box[24:34, 18:26, 12:17] = 1  # axes to the left, to anterior and up
    images = {"CT": 1000.0 * box, "MR": 500.0 * box, "PET": 10.0 * box}
    windows = {"CT": (0, 1000), "MR": (0, 500), "PET": (0, 10)}
    empty = np.zeros_like(box)
    case = Overlay("box", images, box, empty, (2.0, 2.0, 4.0), "LAS", windows, dice=0.0)
    regions = {"whole": [1, 2], "core": [2]}
    other = dataclasses.replace(case, title="regions", images={"MR": images["MR"]}, regions=regions)
    write_report(tmp_path / "report.html", "Viewer", [], [case, other], {}, {})
    return tmp_path / "report.html"


def canvas(browser: Browser, panel: int) -> np.ndarray:
    """RGB of a panel of the viewer."""
    browser.run(f"document.querySelectorAll('.view')[{panel}].id = 'looked-at'")
    picture = np.asarray(Image.open(io.BytesIO(browser.picture("#looked-at .view-frame"))).convert("RGB"), dtype=int)
    browser.run("document.querySelector('#looked-at').removeAttribute('id')")
    return picture


@pytest.mark.parametrize(
    ("plane", "across", "up"), [(0, 0, 1), (1, 0, 2), (2, 1, 2)], ids=["axial", "coronal", "sagittal"]
)
def test_the_viewer_draws_the_outline_around_what_it_outlines(
    gl_browser: Browser, viewer_page: Path, plane: int, across: int, up: int
) -> None:
    gl_browser.open(viewer_page)
    gl_browser.run("document.querySelector('.show-cross').click()")
    gl_browser.click(f'[data-plane="{plane}"]')
    assert gl_browser.run("[document.querySelector('.viewer').hidden, document.querySelector('.stills').hidden]") == [
        False,
        True,
    ]
    picture = canvas(gl_browser, 0)
    side = picture.shape[0]
    orange = np.abs(picture - (0xE6, 0x9F, 0x00)).sum(axis=2) < 90
    rows, columns = np.nonzero(orange)
    extent = np.array([40, 30, 20]) * (2.0, 2.0, 4.0)
    scale = side / max(extent[across], extent[up])
    first, last = np.array([24, 18, 12]) * (2.0, 2.0, 4.0), np.array([34, 26, 17]) * (2.0, 2.0, 4.0)
    left = (side - extent[across] * scale) / 2
    bottom = (side + extent[up] * scale) / 2
    expected = [
        left + first[across] * scale,
        left + last[across] * scale,
        bottom - last[up] * scale,
        bottom - first[up] * scale,
    ]
    found = [columns.min(), columns.max(), rows.min(), rows.max()]
    np.testing.assert_allclose(found, expected, atol=4)
    bright = np.ptp(picture, axis=2) < 30
    bright &= picture.min(axis=2) > 200
    inside = np.zeros_like(bright)
    inside[rows.min() + 6 : rows.max() - 6, columns.min() + 6 : columns.max() - 6] = True
    assert bright[inside].mean() > 0.98
    outside = np.ones_like(bright)
    outside[rows.min() - 6 : rows.max() + 6, columns.min() - 6 : columns.max() + 6] = False
    assert bright[outside].mean() < 0.02  # letters and the scale bar
    assert_quiet(gl_browser)


def test_pet_is_inverted_and_hot_on_ct(gl_browser: Browser, viewer_page: Path) -> None:
    gl_browser.open(viewer_page)
    titles = gl_browser.run("[...document.querySelectorAll('.view-head b')].map(b => b.textContent)")
    assert titles == ["CT", "MR", "PET", "PET on CT"]
    for box in (".show-cross", ".key [data-mask=reference]"):
        gl_browser.run(f"document.querySelector('{box}').click()")
    pet = canvas(gl_browser, 2)
    assert pet[20, 40].tolist() == [255, 255, 255]
    assert pet.min(axis=2).min() < 10
    gl_browser.run(
        "(s => { s.value = 5; s.dispatchEvent(new Event('change')); })(document.querySelectorAll('.view select')[3])"
    )
    assert gl_browser.run("document.querySelectorAll('.view-head small')[3].textContent") == "0 to 20"
    fused = canvas(gl_browser, 3)  # half of SUV 20: red 255, green 128 on white CT, half transparent
    middle = fused[np.ptp(fused, axis=2) > 60]
    np.testing.assert_allclose(np.median(middle, axis=0), [255, 191, 128], atol=6)


def test_keys_move_slices_planes_and_the_zoom_of_the_viewer(gl_browser: Browser, viewer_page: Path) -> None:
    gl_browser.open(viewer_page)
    shown = "document.querySelector('.slice output').textContent"
    assert gl_browser.run(shown) == "slice 13 of 20"
    gl_browser.run("document.querySelector('.views').focus()")
    for key, code, expected in (
        ("ArrowUp", 38, "slice 14 of 20"), ("ArrowLeft", 37, "slice 13 of 20"), ("PageDown", 34, "slice 8 of 20"),
        ("Home", 36, "slice 1 of 20"), ("End", 35, "slice 20 of 20"), ("d", 68, "slice 15 of 20"),
    ):  # fmt: skip
        gl_browser.key(key, code)
        assert gl_browser.run(shown) == expected, key
    gl_browser.key("2", 50)
    assert gl_browser.run("document.querySelector('[data-plane=\"1\"]').ariaPressed") == "true"
    assert gl_browser.run(shown).endswith("of 30")
    before = canvas(gl_browser, 0)
    gl_browser.key("+", 187)
    assert np.abs(canvas(gl_browser, 0) - before).mean() > 1
    gl_browser.key("0", 48)
    np.testing.assert_array_equal(canvas(gl_browser, 0), before)
    gl_browser.key("o", 79)
    assert gl_browser.run("document.querySelector('.key [data-mask=reference]').checked") is False
    gl_browser.key("c", 67)
    assert gl_browser.run("document.querySelector('.show-cross').checked") is False


def test_the_viewer_changes_cases_with_other_panels(gl_browser: Browser, viewer_page: Path) -> None:
    gl_browser.open(viewer_page)
    gl_browser.open_case(1)
    visible = (
        "[...document.querySelectorAll('.view')].filter(v => !v.hidden).map(v => v.querySelector('b').textContent)"
    )
    assert gl_browser.run(visible) == ["MR"]
    assert gl_browser.run("[...document.querySelectorAll('.key [data-region]')].length") == 2
    gl_browser.open_case(0)
    assert len(gl_browser.run(visible)) == 4
    files = {url.rpartition("/")[2].partition("_")[0] for url in gl_browser.loaded if url.endswith(".js")}
    assert files == {"case0", "case0-volumes", "case1", "case1-volumes", "viewer"}
    assert_quiet(gl_browser)


def test_without_webgl_still_images_are_shown_and_the_page_says_why(browser: Browser, viewer_page: Path) -> None:
    browser.open(viewer_page)
    assert browser.text(".no-viewer") == "This browser has no WebGL: still images are shown."
    assert browser.run("[document.querySelector('.viewer').hidden, document.querySelector('.stills').hidden]") == [
        True,
        False,
    ]
    assert not any("viewer" in url for url in browser.loaded if url.endswith(".js"))
    assert_quiet(browser)


def test_one_file_holds_the_viewer_too(gl_browser: Browser, viewer_page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPORT_VIEWER", str(LIBRARY))
    volume = np.random.default_rng(0).normal(size=(8, 8, 8))
    case = Overlay("one", {"MR": volume}, None, (volume > 1).astype(np.uint8), (1, 1, 1))
    path = viewer_page.with_name("one.html")
    write_report(path, "One", [], [case], {}, {}, single_file=True)
    gl_browser.open(path)
    assert gl_browser.run("document.querySelector('.viewer').hidden") is False
    assert [url for url in gl_browser.loaded if url.endswith(".js")] == []
    assert_quiet(gl_browser)


@pytest.mark.parametrize("name", WIDTHS)
def test_the_viewer_fits_the_width_of_the_screen(gl_browser: Browser, viewer_page: Path, name: str) -> None:
    gl_browser.open(viewer_page, WIDTHS[name])
    assert gl_browser.run("document.documentElement.scrollWidth") == WIDTHS[name]
    sizes = gl_browser.run("[...document.querySelectorAll('.view-frame')].map(f => [f.clientWidth, f.clientHeight])")
    assert len({tuple(size) for size in sizes}) == 1
    assert sizes[0][0] >= 150
    picture = Path(__file__).parents[2] / "runs" / "browser" / f"viewer_{name}.png"  # to be looked at
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(gl_browser.picture())
