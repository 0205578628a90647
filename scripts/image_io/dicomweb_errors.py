# SPDX-License-Identifier: Apache-2.0
"""What may go wrong with a PACS, in one sentence each. Answers of servers are not quoted: they may name patients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from scripts.image_io.dicom_packages import dicom_package

# PS3.4, Annex B.2.3, PS3.7, Annex C, and PS3.18, 10.5.3.
REASONS = {
    0x0110: "processing failure",
    0x0111: "it is there already",
    0x0117: "invalid UID",
    0x0122: "this kind of object is not supported",
    0x0124: "not authorised",
    0xA700: "out of resources",
    0xA900: "it does not fit its SOP class",
    0xC000: "it cannot be understood",
}
ORTHANC = " (that of Orthanc ends in /dicom-web)"
LOGIN = "DICOMWEB_USER and DICOMWEB_PASSWORD, or DICOMWEB_TOKEN"


class PacsError(ValueError):
    """A server cannot be used, or refused something. The message contains no patient data and no login.

    Attributes:
        broken: the connection broke: another try may succeed.
        fatal: no other request will succeed, such as without a login.
    """

    def __init__(self, message: str, broken: bool = False, fatal: bool = False) -> None:
        super().__init__(message, broken, fatal)  # all of them, so that a process can send the error to another
        self.broken, self.fatal = broken, fatal

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def one_sentence(url: str, what: str, names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turn the errors of the HTTP and DICOM packages into ``PacsError``.

    Args:
        url: of the service.
        what: was tried, such as ``find the series of the study 1.2``.
        names: of files by SOP Instance UID, if they were to be stored.
    """
    exceptions = dicom_package("requests").exceptions
    try:
        yield
    except PacsError:
        raise
    except exceptions.SSLError as error:
        raise PacsError(
            f"The certificate of {urlsplit(url).netloc} is not trusted{_tls_reason(error)}. If the hospital has its "
            "own authority, name its file in REQUESTS_CA_BUNDLE.",
            fatal=True,
        ) from None
    except (exceptions.ConnectTimeout, exceptions.ProxyError) as error:
        raise PacsError(_unreachable(url, error), fatal=True) from None
    except exceptions.HTTPError as error:
        raise _of_status(error.response, url, what, names or {}) from None
    except (exceptions.ChunkedEncodingError, exceptions.ReadTimeout, exceptions.ContentDecodingError):
        raise PacsError(f"The connection with {url} broke: could not {what}. Try again.", broken=True) from None
    except exceptions.ConnectionError as error:
        if "NewConnectionError" in repr(error) or "NameResolutionError" in repr(error):
            raise PacsError(_unreachable(url, error), fatal=True) from None
        raise PacsError(f"The connection with {url} broke: could not {what}. Try again.", broken=True) from None
    except exceptions.JSONDecodeError:
        raise PacsError(_no_service(url), fatal=True) from None
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, exceptions.RequestException):
            raise  # of this machine, such as a full disk
        # pydicom and dicomweb-client raise many types on what is no DICOM, and quote its content.
        raise PacsError(
            f"{url} gave an answer that is not DICOM ({type(error).__name__}): could not {what}. Try again, or check "
            "the server.",
            broken=True,
        ) from None


def _tls_reason(error: Exception) -> str:
    text = str(error)
    for reason in ("self-signed certificate", "self signed certificate", "expired", "mismatch", "unable to get local"):
        if reason in text:
            return f" ({reason.replace('unable to get local', 'its authority is unknown')})"
    return ""


def _unreachable(url: str, error: Exception) -> str:
    name = "its name is unknown" if "NameResolution" in repr(error) else "no answer"
    return f"{urlsplit(url).netloc} cannot be reached ({name}). Check the URL, and that the server runs."


def _no_service(url: str) -> str:
    return f"{url} is no DICOMweb service. Check the URL{ORTHANC}."


def _of_status(response: Any, url: str, what: str, names: Mapping[str, str]) -> PacsError:
    status = response.status_code
    if status in (401, 407):
        return PacsError(f"{url} wants another login ({status}). Set {LOGIN} in the environment.", fatal=True)
    if status == 403:
        return PacsError(f"{url} does not allow this login (403) to {what}.")
    if names:
        refused = failure_reasons(_answer(response), names)
        return PacsError(f"{url} refused {refused or ', '.join(names.values())} ({status}{_status_words(status)}).")
    if status in (404, 410):
        return PacsError(f"{url} has no such thing ({status}): could not {what}. Check the UID and the URL{ORTHANC}.")
    if status in (406, 415):
        return PacsError(f"{url} does not have the images in a form that can be read ({status}): could not {what}.")
    return PacsError(f"{url} failed ({status}{_status_words(status)}): could not {what}.", broken=status >= 500)


def _status_words(status: int) -> str:
    words = {
        **{400: "bad request", 409: "conflict", 411: "a length is required", 413: "too large", 500: "internal error"},
        **{502: "bad gateway", 503: "not available", 504: "gateway timeout", 507: "no space left"},
    }
    return f", {words[status]}" if status in words else ""


def _answer(response: Any) -> Any:
    """The data set in an answer to STOW-RS; an empty one where there is none."""
    pydicom = dicom_package("pydicom")
    try:
        return pydicom.Dataset.from_json(response.json())
    except Exception:  # another kind of text
        return pydicom.Dataset()


def failure_reasons(answer: Any, names: Mapping[str, str]) -> str:
    """The objects that a server refused, with its reasons, such as ``seg.dcm (out of resources, A700)``; or nothing.

    Args:
        answer: the data set in an answer to STOW-RS.
        names: of files by SOP Instance UID.
    """
    listed = []
    for item in answer.get("FailedSOPSequence", []) or []:
        uid, code = str(item.get("ReferencedSOPInstanceUID", "")), int(item.get("FailureReason") or 0)
        reason = next((text for known, text in REASONS.items() if _same(code, known)), "no known reason")
        listed.append(f"{names.get(uid, uid)} ({reason}, {code:04X})")
    return ", ".join(listed)


def _same(code: int, known: int) -> bool:
    """Whether a status is a known one; the last digits of A7xx, A9xx and Cxxx are the server's own."""
    masks = {0xA700: 0xFF00, 0xA900: 0xFF00, 0xC000: 0xF000}
    return code & masks.get(known, 0xFFFF) == known
