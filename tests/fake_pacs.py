# SPDX-License-Identifier: Apache-2.0
"""A small DICOMweb server for tests: real HTTP on 127.0.0.1, objects in memory, and faults on request."""

from __future__ import annotations

import base64
import json
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pydicom

SERIES_FIELDS = ("Modality", "SeriesInstanceUID", "SeriesDescription")
FAILED, REFERENCED, REASON = "FailedSOPSequence", "ReferencedSOPSequence", "FailureReason"


@dataclass
class Faults:
    """What the server does wrong.

    Attributes:
        statuses: status of requests whose path matches a pattern.
        cut: of paths that match, the number of bytes after which the connection is closed.
        cuts: how often that happens.
        say_length: announce the length of bodies; without it, a cut body looks complete to HTTP.
        refuse: FailureReason of every object that is stored.
        silent: answer to STOW-RS without a body.
        forget: answer to STOW-RS, and store nothing.
        page: number of series in one answer.
        drop: objects that are in the metadata and are not given out.
        redirect: where every request is sent.
        html: answer with a page of HTML.
    """

    statuses: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    cuts: int = 10**6
    say_length: bool = True
    refuse: int = 0
    silent: bool = False
    forget: bool = False
    page: int = 10**6
    drop: set[str] = field(default_factory=set)
    redirect: str = ""
    html: bool = False


class FakePacs:
    """The server's state; ``requests`` lists ``METHOD /path`` of all requests."""

    def __init__(self, login: str = "") -> None:
        self.objects: dict[str, bytes] = {}
        self.heads: dict[str, Any] = {}
        self.requests: list[str] = []
        self.logins: list[str] = []
        self.faults, self.login, self.url = Faults(), login, ""

    def add(self, data: bytes) -> str:
        head = pydicom.dcmread(BytesIO(data), stop_before_pixels=True)
        self.objects[head.SOPInstanceUID], self.heads[head.SOPInstanceUID] = data, head
        return str(head.SOPInstanceUID)

    def add_folder(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*.dcm")):
            self.add(path.read_bytes())

    def of(self, study: str, series: str = "", instance: str = "") -> list[Any]:
        wanted = {"StudyInstanceUID": study, "SeriesInstanceUID": series, "SOPInstanceUID": instance}
        heads = self.heads.values()
        return [h for h in heads if all(not uid or h.get(keyword) == uid for keyword, uid in wanted.items())]

    def fetched(self) -> set[str]:
        """The series that were fetched."""
        return {found[1] for each in self.requests if (found := re.fullmatch(r"GET .*/series/([\d.]+)", each))}


@contextmanager
def fake_pacs(login: str = "", certificate: Path | None = None) -> Iterator[FakePacs]:
    """Serve until the end of the block.

    Args:
        login: the Authorization header that every request needs.
        certificate: PEM file with a certificate and its key, for https.
    """
    pacs = FakePacs(login)

    class Handler(_Handler):
        state = pacs

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    pacs.url = f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_address[1]}/dicom-web"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield pacs
    finally:
        server.shutdown()
        server.server_close()


def basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


class _Handler(BaseHTTPRequestHandler):
    state: FakePacs
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self._begin("GET")
        if path is None:
            return
        study, series, instance, metadata = path
        heads = self.state.of(study, series, instance)
        query = parse_qs(urlsplit(self.path).query)
        if self.path.split("?")[0].endswith("/series"):
            self._json(self._page([_json_of(h, SERIES_FIELDS) for h in _first_of_series(heads)], query))
        elif self.path.split("?")[0].endswith("/instances"):
            wanted = query.get("SOPInstanceUID", query.get("00080018", [""]))[0]
            self._json([_json_of(h, ("SOPInstanceUID",)) for h in heads if not wanted or h.SOPInstanceUID == wanted])
        elif not heads:
            self._answer(404, b"", "text/plain")
        elif metadata:
            self._json([h.to_json_dict() for h in heads])
        else:
            uids = [str(h.SOPInstanceUID) for h in heads if h.SOPInstanceUID not in self.state.faults.drop]
            parts = b"".join(b"--BOUND\r\nContent-Type: application/dicom\r\n\r\n" + self.state.objects[uid] + b"\r\n"
                             for uid in uids)  # fmt: skip
            self._answer(200, parts + b"--BOUND--\r\n", 'multipart/related; type="application/dicom"; boundary=BOUND')

    def do_POST(self) -> None:
        path, faults = self._begin("POST"), self.state.faults
        if path is None:
            return
        answer, refused = pydicom.Dataset(), []
        stored = []
        for data in self._parts():
            head = pydicom.dcmread(BytesIO(data), stop_before_pixels=True)
            item = pydicom.Dataset()
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = head.SOPClassUID, head.SOPInstanceUID
            if faults.refuse:
                item.FailureReason = faults.refuse
                refused.append(item)
            else:
                stored.append(item)
                if not faults.forget:
                    self.state.add(data)
        if refused:
            setattr(answer, FAILED, refused)
        if stored:
            setattr(answer, REFERENCED, stored)
        if faults.silent or faults.forget:
            self._answer(200, b"", "application/dicom+json")
        else:
            self._answer(409 if refused and not stored else 202 if refused else 200,
                         json.dumps(answer.to_json_dict()).encode(), "application/dicom+json")  # fmt: skip

    def _begin(self, method: str) -> tuple[str, str, str, bool] | None:
        """Study, series, instance and whether metadata are asked for; None if the request is answered already."""
        path, faults = self.path.split("?")[0], self.state.faults
        self.body = self._read_body() if method == "POST" else b""
        self.state.requests.append(f"{method} {path}")
        self.state.logins.append(self.headers.get("Authorization", ""))
        status = next((code for pattern, code in faults.statuses.items() if re.search(pattern, path)), 0)
        if faults.redirect:
            self.send_response(302)
            self.send_header("Location", faults.redirect)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        if self.state.login and self.headers.get("Authorization") != self.state.login:
            status = 401
        found = re.fullmatch(
            r"/dicom-web/studies/([\d.]+)(?:/series(?:/([\d.]+))?)?(?:/instances(?:/([\d.]+))?)?(/metadata)?", path
        )
        if faults.html and not status:
            self._answer(200, b"<html>Welcome</html>", "text/html")
            return None
        if status or not found:
            self._answer(status or 404, b"<html>no</html>", "text/html")
            return None
        return found[1], found[2] or "", found[3] or "", bool(found[4])

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _parts(self) -> list[bytes]:
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        boundary = BytesParser().parsebytes(head).get_param("boundary")
        parts = self.body.split(f"--{boundary}".encode())[1:-1]
        return [part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n") for part in parts]

    def _page(self, rows: list[Any], query: dict[str, list[str]]) -> list[Any]:
        start = int(query.get("offset", ["0"])[0])
        return rows[start : start + self.state.faults.page]

    def _json(self, rows: list[Any]) -> None:
        self._answer(200, json.dumps(rows).encode(), "application/dicom+json")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        faults, path = self.state.faults, self.path.split("?")[0]
        limit = next((size for pattern, size in faults.cut.items() if re.search(pattern, path)), None)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if faults.say_length:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        if limit is not None and faults.cuts > 0:
            faults.cuts -= 1
            body, self.close_connection = body[:limit], True
        if not faults.say_length:
            self.close_connection = True
        self.wfile.write(body)
        self.wfile.flush()


def _first_of_series(heads: list[Any]) -> list[Any]:
    return list({str(h.SeriesInstanceUID): h for h in heads}.values())


def _json_of(head: Any, keywords: tuple[str, ...]) -> Any:
    part = pydicom.Dataset()
    for keyword in keywords:
        if keyword in head:
            part[keyword] = head[keyword]
    return part.to_json_dict()
