# SPDX-License-Identifier: Apache-2.0
"""The report in Chromium: no errors, tables sort, sliders change the slice, the layout fits a phone and a desktop.

The tests drive Chromium by its DevTools protocol over two pipes, so that only Chromium has to be installed.
"""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_erosion

from scripts.evaluation.compare import compare
from scripts.evaluation.score import score

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), "")
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--remote-debugging-pipe",
]  # fmt: skip
# Chromium reads commands from file descriptor 3 and writes answers to 4.
START = "import os, sys; a = sys.argv; os.dup2(int(a[1]), 3); os.dup2(int(a[2]), 4); os.execv(a[3], a[3:])"
EVIL = "<script>alert(1)</script>"
WIDTHS = {"phone": 360, "desktop": 1280}
# Of every visible element with its own text: the text, its colour and its background colour.
COLOURS = """[...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && !["SCRIPT", "OPTION"].includes(
  e.tagName) && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
  let back = e; while (back && getComputedStyle(back).backgroundColor === "rgba(0, 0, 0, 0)") back = back.parentElement;
  return [e.textContent.slice(0, 40), getComputedStyle(e).color, getComputedStyle(back || document.documentElement)
    .backgroundColor]; })"""


class Browser:
    """One page of a headless Chromium; ``errors`` lists errors and warnings, ``loaded`` the requested URLs."""

    def __init__(self, profile: Path) -> None:
        ours, theirs = os.pipe(), os.pipe()
        passed = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (ours[0], theirs[1])]  # neither 3 nor 4
        command = [sys.executable, "-c", START, *map(str, passed), CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
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
        self.run("Promise.all([...document.images].map(image => image.decode()))")

    def key(self, key: str, code: int) -> None:
        """Press and release one key, as on a keyboard."""
        named = {"key": key, "code": key, "windowsVirtualKeyCode": code, **({"text": "\r"} if key == "Enter" else {})}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **named)

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
    if not CHROMIUM:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(phantoms: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two evaluations of phantoms: two centres, one failure, one patient id that is markup."""
    import SimpleITK as sitk  # noqa: N813

    folder = tmp_path_factory.mktemp("report")
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
        score("student", cases, [[0], [1]], str(masks), str(masks.parent), intensity, workers=1, present=present)
    compare([str(folder / "0"), str(folder / "1")], str(folder / "both"), cases, intensity, title="Student on phantoms")
    return folder / "both" / "report.html"


@pytest.fixture
def opened(browser: Browser, page: Path) -> Iterator[Browser]:
    """The report in a desktop window; after each test there must be no error and no request to the network."""
    browser.open(page)
    yield browser
    assert browser.errors == []
    assert {url.partition(":")[0] for url in browser.loaded} == {"file", "data"}


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
    assert opened.run("document.scripts.length") == 1


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


@pytest.mark.parametrize("number", [0, 4, 8], ids=["axial", "coronal", "sagittal"])
def test_arrow_keys_on_a_slider_change_the_slice_and_announce_its_number(opened: Browser, number: int) -> None:
    plane = f".case:nth-of-type({number // 3 + 1}) .plane:nth-of-type({number % 3 + 2})"
    slider = f"document.querySelector('{plane} input')"
    slice_numbers = opened.run(f"document.querySelector('{plane}').dataset.sliceNumbers").split()
    opened.run(f"{slider}.focus()")
    opened.key("Home", 36)
    seen = []
    for slice_number in slice_numbers[:3]:
        announced, shown = opened.run(f"[{slider}.ariaValueText, document.querySelector('{plane} output').textContent]")
        assert announced == shown
        assert announced.startswith(f"slice {slice_number} of ")
        seen.append(opened.picture(f"{plane} .frame"))
        opened.key("ArrowRight", 39)
    assert len(set(seen)) == 3
    opened.key("Home", 36)
    assert opened.picture(f"{plane} .frame") == seen[0]


def test_the_slider_shows_the_frame_of_its_position(opened: Browser) -> None:
    opened.run("document.querySelector('.show-outlines').click()")  # hides the outlines
    source = opened.run("document.querySelector('.frame img').src")
    strip = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("L")
    count = len(opened.run("document.querySelector('.plane').dataset.sliceNumbers").split())
    opened.run("document.querySelectorAll('.frame i').forEach(letter => letter.remove())")
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


def test_the_outlines_can_be_hidden(opened: Browser) -> None:
    def colourful() -> int:
        pixels = np.asarray(Image.open(io.BytesIO(opened.picture(".frame"))).convert("RGB"), dtype=int)
        return int((np.ptp(pixels, axis=2) > 60).sum())

    assert colourful() > 50
    opened.click(".show-outlines")
    assert colourful() == 0
    opened.click(".show-outlines")
    assert colourful() > 50


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
    assert browser.run("parseFloat(getComputedStyle(document.querySelector('td')).fontSize)") >= 14
    picture = Path(__file__).parents[2] / "runs" / "browser" / f"report_{name}.png"  # to be looked at
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(browser.picture())
    assert Image.open(picture).width == WIDTHS[name]
    assert browser.errors == []


def test_the_file_is_small(page: Path) -> None:
    assert page.stat().st_size < 2e6
