# SPDX-License-Identifier: Apache-2.0
"""The client of a PACS against a small server, by real HTTP."""

from __future__ import annotations

import logging
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import generate_uid

from scripts.image_io.dicom_study import find_series
from scripts.image_io.dicomweb import Pacs, is_uid
from scripts.image_io.dicomweb_errors import PacsError
from scripts.image_io.dicomweb_session import PASSWORD, TOKEN, USER, check_url
from tests.dicom_phantom import MARKER, make_slice
from tests.fake_pacs import FakePacs, basic, fake_pacs

pytest.importorskip("dicomweb_client")
STUDY, CT, SR = generate_uid(), generate_uid(), generate_uid()
KINDS = ["CT", "PT", "MR"]
COUNT, SIZE = 6, 32


@pytest.fixture(autouse=True)
def _no_login(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (USER, PASSWORD, TOKEN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("scripts.image_io.dicomweb.WAIT_MS", 1)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CT of six slices with a scout among them, and a report."""
    folder = tmp_path_factory.mktemp("study")
    pixels = {"Rows": SIZE, "Columns": SIZE, "PixelData": bytes(range(256)) * (SIZE * SIZE * 2 // 256)}
    geometry = {"PixelSpacing": [1, 1], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "SliceThickness": "2.5"}
    for number in range(COUNT):
        kind = ["ORIGINAL", "PRIMARY", "LOCALIZER" if number == COUNT - 1 else "AXIAL"]
        tags = {"ImageType": kind, "InstanceNumber": number + 1, "SeriesDescription": "CT body", **geometry, **pixels}
        each = make_slice("CT", CT, "1.2.9", STUDY, ImagePositionPatient=[0, 0, number], **tags)
        each.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    report = make_slice("CT", SR, "1.2.9", STUDY, Modality="SR")
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    report.save_as(folder / "report.dcm", enforce_file_format=True)
    return folder


@pytest.fixture
def pacs(study: Path) -> Iterator[FakePacs]:
    with fake_pacs() as server:
        server.add_folder(study)
        yield server


def test_series_are_found_as_they_are_in_a_folder(pacs: FakePacs, study: Path) -> None:
    (found,) = Pacs(pacs.url).find_series(STUDY, KINDS, ["SeriesDescription", "BodyPartExamined"])
    (expected,) = find_series(study, ["SeriesDescription", "BodyPartExamined"])
    assert found._replace(folder=study) == expected
    assert (found.slices, found.elements["SliceThickness"]) == (COUNT - 1, ("2.5",))
    assert not any(SR in each for each in pacs.requests)  # nothing is asked of series that are no images


@pytest.mark.parametrize("page", [1, 10])
def test_a_server_that_answers_in_pages_is_asked_for_all(pacs: FakePacs, page: int) -> None:
    pacs.faults.page = page
    assert set(Pacs(pacs.url)._all_series(STUDY)) == {CT, SR}


def test_a_fetched_series_is_what_was_stored(pacs: FakePacs, study: Path, tmp_path: Path) -> None:
    assert Pacs(pacs.url).fetch_series(STUDY, CT, tmp_path / "ct") == COUNT
    fetched = {str(pydicom.dcmread(path).SOPInstanceUID): pydicom.dcmread(path) for path in (tmp_path / "ct").iterdir()}
    for path in study.glob("[0-9].dcm"):
        original = pydicom.dcmread(path)
        assert fetched[str(original.SOPInstanceUID)] == original
        assert fetched[str(original.SOPInstanceUID)].PixelData == original.PixelData
    assert [path.name for path in tmp_path.iterdir()] == ["ct"]


def test_a_broken_connection_is_made_up_for(pacs: FakePacs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After two and a half of six images; the missing ones are then fetched one by one."""
    pacs.faults.cut, pacs.faults.cuts = {f"{CT}$": 5800}, 1
    with caplog.at_level(logging.WARNING):
        assert Pacs(pacs.url).fetch_series(STUDY, CT, tmp_path / "ct") == COUNT
    assert "broke: could not fetch the series" in caplog.text
    assert len(list((tmp_path / "ct").glob("*.dcm"))) == COUNT


@pytest.mark.parametrize("say_length", [True, False], ids=["length", "no length"])
@pytest.mark.parametrize("size", [100, 5800, 12_000])
def test_a_series_that_is_cut_never_looks_complete(pacs: FakePacs, size: int, say_length: bool, tmp_path: Path) -> None:
    pacs.faults.cut = {r"/instances/[\d.]+$": min(size, 1500), r"/series/[\d.]+$": size}
    pacs.faults.say_length = say_length
    with pytest.raises(PacsError, match=r"broke|arrived|gave|not DICOM"):
        Pacs(pacs.url).fetch_series(STUDY, CT, tmp_path / "ct")
    assert not (tmp_path / "ct").exists()
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())


def test_an_object_that_the_server_does_not_give_is_missed(pacs: FakePacs, tmp_path: Path) -> None:
    pacs.faults.drop = {pacs.of(STUDY, CT)[3].SOPInstanceUID}
    with pytest.raises(PacsError, match=f"not DICOM|gave 5 of 6 objects of the series {CT}"):
        Pacs(pacs.url).fetch_series(STUDY, CT, tmp_path / "ct")
    assert not (tmp_path / "ct").exists()


def _object(tmp_path: Path, name: str = "seg.dcm", pixels: int = SIZE) -> Path:
    tags = {"Rows": pixels, "Columns": pixels, "PixelData": b"\0\1" * pixels * pixels}
    make_slice("CT", generate_uid(), "1.2.9", STUDY, **tags).save_as(tmp_path / name, enforce_file_format=True)
    return tmp_path / name


@pytest.mark.parametrize("pixels", [SIZE, 1024], ids=["small", "chunked"])
def test_objects_are_stored_as_they_are(pacs: FakePacs, pixels: int, tmp_path: Path) -> None:
    files = [_object(tmp_path, pixels=pixels), _object(tmp_path, "rtstruct.dcm")]
    uids = Pacs(pacs.url).store(STUDY, files)
    for uid, file in zip(uids, files, strict=True):
        assert pydicom.dcmread(pydicom.filebase.DicomBytesIO(pacs.objects[uid])) == pydicom.dcmread(file)
    assert Pacs(pacs.url).store(STUDY, files) == uids


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0xA700, "out of resources, A700"),
        (0xA7FF, "out of resources, A7FF"),
        (0x0122, "this kind of object is not supported, 0122"),
        (0xC123, "it cannot be understood, C123"),
        (0x0999, "no known reason, 0999"),
    ],
)
def test_a_refusal_is_told_with_its_reasons(pacs: FakePacs, code: int, words: str, tmp_path: Path) -> None:
    pacs.faults.refuse = code
    with pytest.raises(PacsError, match=rf"refused seg\.dcm \({words}\) \(409, conflict\)"):
        Pacs(pacs.url).store(STUDY, [_object(tmp_path)])


def test_a_partial_failure_names_what_was_refused(
    pacs: FakePacs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server accepts the first object, and has no room for the second."""
    add = pacs.add

    def full(data: bytes) -> str:
        pacs.faults.refuse = 0xA700
        return add(data)

    monkeypatch.setattr(pacs, "add", full)
    files = [_object(tmp_path), _object(tmp_path, "rtstruct.dcm")]
    with pytest.raises(PacsError, match=r"refused rtstruct\.dcm \(out of resources, A700\)\. What it accepted stays"):
        Pacs(pacs.url).store(STUDY, files)


def test_an_answer_without_words_is_believed_if_the_object_is_there(pacs: FakePacs, tmp_path: Path) -> None:
    pacs.faults.silent = True
    assert Pacs(pacs.url).store(STUDY, [_object(tmp_path)])
    pacs.faults.forget = True
    with pytest.raises(PacsError, match=r"does not confirm that it stored seg\.dcm"):
        Pacs(pacs.url).store(STUDY, [_object(tmp_path)])


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"wants another login \(401\)\. Set DICOMWEB_USER and DICOMWEB_PASSWORD, or DICOMWEB_TOKEN"),
        (403, r"does not allow this login \(403\) to find the series of the study"),
        (404, r"has no such thing \(404\): could not find the series of the study .*ends in /dicom-web"),
        (500, r"failed \(500, internal error\): could not find the series"),
    ],
)
def test_a_status_becomes_a_sentence(pacs: FakePacs, status: int, message: str) -> None:
    pacs.faults.statuses = {"/series$": status}
    with pytest.raises(PacsError, match=message):
        Pacs(pacs.url).find_series(STUDY, KINDS)


@pytest.mark.parametrize(("status", "message"), [(413, r"refused seg\.dcm \(413, too large\)"), (507, "no space left")])
def test_a_status_of_a_refused_object_becomes_a_sentence(
    pacs: FakePacs, status: int, message: str, tmp_path: Path
) -> None:
    pacs.faults.statuses = {"/studies/": status}
    with pytest.raises(PacsError, match=message):
        Pacs(pacs.url).store(STUDY, [_object(tmp_path)])


def test_what_a_server_lacks_is_named(pacs: FakePacs) -> None:
    client = Pacs(pacs.url)
    with pytest.raises(PacsError, match=r"has no study 1\.2\.3, or none that this login may see"):
        client.find_series("1.2.3", KINDS)
    with pytest.raises(PacsError, match=f"The study {STUDY} has no images of MR or PT: its series are CT, SR"):
        client.find_series(STUDY, ["MR", "PT"])
    with pytest.raises(PacsError, match=r"'\.\./1' is no DICOM UID"):
        client.find_series("../1", KINDS)
    pacs.faults.html = True
    with pytest.raises(PacsError, match=r"is no DICOMweb service\. Check the URL"):
        client.find_series(STUDY, KINDS)


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(PacsError, match=rf"127\.0\.0\.1:{port} cannot be reached \(no answer\)") as caught:
        Pacs(f"http://127.0.0.1:{port}/dicom-web").find_series(STUDY, KINDS)
    assert caught.value.fatal


@pytest.mark.parametrize(
    ("variables", "header"),
    [({USER: "reader", PASSWORD: "s3:cret"}, basic("reader", "s3:cret")), ({TOKEN: "abc"}, "Bearer abc")],
)
def test_the_login_comes_from_the_environment(
    study: Path, variables: dict[str, str], header: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login other password other\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    with fake_pacs(login=header) as pacs:
        pacs.add_folder(study)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert Pacs(pacs.url).find_series(STUDY, KINDS)
        assert set(pacs.logins) == {header}
        monkeypatch.setenv(next(iter(variables)), "wrong")
        with pytest.raises(PacsError, match=r"wants another login \(401\)") as caught:
            Pacs(pacs.url).find_series(STUDY, KINDS)
        assert caught.value.fatal
        assert not any(secret in str(caught.value) for secret in ("s3:cret", "abc", "wrong"))


def test_neither_images_nor_login_of_this_machine_go_by_a_proxy(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "abc")
    with fake_pacs(login="Bearer abc") as pacs, fake_pacs() as proxy:
        pacs.add_folder(study)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url.rpartition("/")[0])
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        assert Pacs(pacs.url).find_series(STUDY, KINDS)
        assert proxy.requests == []


def test_a_redirect_to_another_host_does_not_get_the_login(pacs: FakePacs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "abc")
    with fake_pacs() as other:
        pacs.faults.redirect = f"{other.url}/studies/{STUDY}/series"
        with pytest.raises(PacsError, match="has no study"):
            Pacs(pacs.url).find_series(STUDY, KINDS)
        assert pacs.logins[0] == "Bearer abc"
        assert other.logins
        assert not any(other.logins)


@pytest.mark.parametrize(
    ("variables", "message"),
    [({USER: "u"}, "only one of DICOMWEB_USER"), ({USER: "u", PASSWORD: "p", TOKEN: "t"}, "Keep one login")],
)
def test_half_a_login_is_refused(variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PacsError, match=message):
        Pacs("https://pacs.example/dicom-web")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://u:p@pacs.example/", r"Give the login in the environment \(DICOMWEB_USER"),
        ("ftp://pacs.example/", "is no URL of a DICOMweb service"),
        ("pacs.example", "is no URL of a DICOMweb service"),
        ("https://pacs.example/?a=b", "is no URL of a DICOMweb service"),
        ("https://pacs.example:port/", "is no URL of a DICOMweb service"),
    ],
)
def test_what_is_no_url_is_refused(url: str, message: str) -> None:
    with pytest.raises(PacsError, match=message):
        check_url(url)


def test_an_unencrypted_url_is_warned_of_and_never_gets_a_login(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in ("https://pacs.example/dicom-web/", "http://localhost:8042/x", "http://127.0.0.1/x"):
        assert check_url(url) == url.rstrip("/")
    assert not caplog.text
    assert check_url("http://pacs.example/x") == "http://pacs.example/x"
    assert "http://pacs.example/x is not encrypted: everybody on the way can read" in caplog.text
    monkeypatch.setenv(TOKEN, "t")
    with pytest.raises(PacsError, match="would send the login unencrypted"):
        check_url("http://pacs.example/x")
    assert check_url("http://127.0.0.1/x")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that nobody has signed."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    subprocess.run(command, check=True, capture_output=True)
    (folder / "both.pem").write_text((folder / "cert.pem").read_text() + (folder / "key.pem").read_text())
    return folder


def test_a_certificate_is_trusted_only_if_its_authority_is_named(
    study: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    with fake_pacs(certificate=certificate / "both.pem") as pacs:
        pacs.add_folder(study)
        with pytest.raises(PacsError, match=r"certificate of 127\.0\.0\.1:\d+ is not trusted \(self.signed") as caught:
            Pacs(pacs.url).find_series(STUDY, KINDS)
        assert caught.value.fatal
        assert not pacs.requests
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate / "cert.pem"))
        assert Pacs(pacs.url).find_series(STUDY, KINDS)
        pacs.faults.redirect = "http://127.0.0.1:1/dicom-web"
        with pytest.raises(PacsError, match="leads from https to an unencrypted address"):
            Pacs(pacs.url).find_series(STUDY, KINDS)


def test_errors_do_not_name_the_patient(pacs: FakePacs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pacs.faults.cut = {f"{CT}": 3000}
    with pytest.raises(PacsError) as caught:
        Pacs(pacs.url).fetch_series(STUDY, CT, tmp_path / "ct")
    assert MARKER not in str(caught.value) + caplog.text


@pytest.mark.parametrize(("text", "expected"), [("1.2.3", True), ("1..2", False), ("1.2\n", False), ("1" * 65, False)])
def test_a_uid_has_digits_and_dots(text: str, expected: bool) -> None:
    assert is_uid(text) is expected
