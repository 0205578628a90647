# SPDX-License-Identifier: Apache-2.0
"""Start and end an Orthanc with its DICOMweb plugin, on a free port of 127.0.0.1 and in a folder of its own."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

PLUGINS = ("/usr/share/orthanc/plugins", "/usr/lib/orthanc", "/usr/local/share/orthanc/plugins")
PLUGIN = "libOrthancDicomWeb.so"
USER, PASSWORD = "reader", "for tests only"
ADVICE = "is not installed: apt-get install orthanc orthanc-dicomweb"


class Orthanc:
    """A running server; its own REST interface, which is not DICOMweb, tells what it holds."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/dicom-web"
        self.session = requests.Session()
        self.session.auth = (USER, PASSWORD)

    def get(self, path: str, **query: str) -> Any:
        """The answer of a GET below the server's root, as JSON where it is."""
        answer = self.session.get(f"{self.root}{path}", params=query, timeout=60)
        answer.raise_for_status()
        return answer.json() if "json" in answer.headers.get("Content-Type", "") else answer.content

    def qido(self, study: str, modality: str) -> list[Any]:
        """The series of a modality in a study, in DICOM JSON."""
        return list(self.get(f"/dicom-web/studies/{study}/series", Modality=modality))

    def files(self, series: str) -> list[bytes]:
        """The files of a series, by its UID."""
        query = {"Level": "Series", "Query": {"SeriesInstanceUID": series}}
        (found,) = self.session.post(f"{self.root}/tools/find", json=query, timeout=60).json()
        return [self.get(f"/instances/{each}/file") for each in self.get(f"/series/{found}")["Instances"]]

    def stow(self, files: list[Path]) -> None:
        """Store files by STOW-RS, written by hand from the standard."""
        body = b"".join(
            b"--PART\r\nContent-Type: application/dicom\r\n\r\n" + file.read_bytes() + b"\r\n" for file in files
        )
        kind = 'multipart/related; type="application/dicom"; boundary=PART'
        answer = self.session.post(
            f"{self.url}/studies",
            data=body + b"--PART--\r\n",
            headers={"Content-Type": kind, "Accept": "application/dicom+json"},
            timeout=120,
        )
        answer.raise_for_status()
        assert len(answer.json()["00081199"]["Value"]) == len(files)


@contextmanager
def orthanc(folder: Path) -> Iterator[Orthanc]:
    """Run an Orthanc until the end of the block; the test is skipped where none is installed."""
    program = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin")
    plugin = next((Path(each) / PLUGIN for each in PLUGINS if (Path(each) / PLUGIN).exists()), None)
    if not program or not plugin:
        pytest.skip(f"Orthanc {ADVICE}" if not program else f"Orthanc's DICOMweb plugin {ADVICE}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        **{"Name": "test", "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db")},
        **{"HttpPort": port, "RemoteAccessAllowed": False, "DicomServerEnabled": False},
        **{"AuthenticationEnabled": True, "RegisteredUsers": {USER: PASSWORD}},
        **{"Plugins": [str(plugin)], "DicomWeb": {"Enable": True, "Root": "/dicom-web/"}},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "orthanc.log").open("wb") as log:
        process = subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log)
        try:
            server = Orthanc(port)
            _wait(server, process, folder / "orthanc.log")
            yield server
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(server: Orthanc, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            assert "dicom-web" in server.get("/plugins")
            return
        except requests.ConnectionError:
            time.sleep(0.1)
    pytest.fail(f"Orthanc does not start: {log.read_text(errors='replace')[-2000:]}")
