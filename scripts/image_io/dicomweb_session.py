# SPDX-License-Identifier: Apache-2.0
"""An HTTP session with a PACS: where it may go, and as whom.

The login comes from the environment alone, because a command line is seen by every user of a machine:
``DICOMWEB_USER`` and ``DICOMWEB_PASSWORD``, or ``DICOMWEB_TOKEN`` (sent as a bearer token). Certificates are always
verified; ``REQUESTS_CA_BUNDLE`` names the file of a hospital's own authority.
"""

from __future__ import annotations

import ipaddress
import logging
import os
from typing import Any
from urllib.parse import urljoin, urlsplit

from scripts.image_io.dicom_packages import dicom_package
from scripts.image_io.dicomweb_errors import PacsError

logger = logging.getLogger(__name__)

USER, PASSWORD, TOKEN = "DICOMWEB_USER", "DICOMWEB_PASSWORD", "DICOMWEB_TOKEN"
TIMEOUT = (10.0, 300.0)  # seconds to connect, and between two parts of an answer


def check_url(url: str) -> str:
    """The URL without a slash at its end.

    ``http://`` is accepted on this machine. To another machine everybody on the way could read the images: a warning
    says so. With a login it is refused, because what a warning tells comes too late for a password.

    Raises:
        PacsError: it is no URL of a service, it contains a login, or it would send one unencrypted.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.username or parts.password:
        raise PacsError(f"Give the login in the environment ({USER} and {PASSWORD}), not in the URL.")
    if parts.scheme not in ("https", "http") or not host or parts.query or parts.fragment:
        raise PacsError(f"{url} is no URL of a DICOMweb service. Give one such as https://pacs.example/dicom-web.")
    if parts.scheme == "http" and not _is_this_machine(host):
        if login_of_environment():
            raise PacsError(f"{url} would send the login unencrypted. Use https://, or remove {USER} and {TOKEN}.")
        logger.warning("%s is not encrypted: everybody on the way can read the patient's images. Use https://.", url)
    return url.rstrip("/")


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def login_of_environment() -> tuple[str, str] | str | None:
    """User and password, or a token, or None.

    Raises:
        PacsError: half a login, or two.
    """
    user, password, token = (os.environ.get(name) or "" for name in (USER, PASSWORD, TOKEN))
    if token and (user or password):
        raise PacsError(f"The environment has {TOKEN} and {USER} or {PASSWORD}. Keep one login.")
    if bool(user) != bool(password):
        raise PacsError(f"The environment has only one of {USER} and {PASSWORD}. Set both.")
    return token or ((user, password) if user else None)


def connected_session(url: str) -> Any:
    """A ``requests.Session`` with the login of the environment that never follows a link from https to http.

    Args:
        url: of the service, which alone gets the login.
    """
    requests = dicom_package("requests")
    login, host = login_of_environment(), urlsplit(url).netloc

    class Login(requests.auth.AuthBase):  # type: ignore[misc, name-defined]
        """The login, for this host only. With it, requests looks into no .netrc."""

        def __call__(self, request: Any) -> Any:
            if login is None or urlsplit(request.url).netloc != host:
                return request
            if isinstance(login, str):
                request.headers["Authorization"] = f"Bearer {login}"
                return request
            return requests.auth.HTTPBasicAuth(*login)(request)

    def refuse_plain_redirect(response: Any, *_: Any, **__: Any) -> None:
        target = response.headers.get("location")
        plain = target and urlsplit(urljoin(response.url, target)).scheme != "https"
        if response.is_redirect and response.url.startswith("https:") and plain:
            raise PacsError(f"{url} leads from https to an unencrypted address, which is refused.")

    session = requests.Session()
    parts = urlsplit(url)
    if parts.scheme == "http" and _is_this_machine(parts.hostname or ""):
        session.trust_env = False  # else a proxy of the environment would get images and login, unencrypted
    session.auth = Login()
    session.headers["Accept"] = "application/dicom+json"  # of answers to STOW-RS, which are XML otherwise
    session.hooks["response"].append(refuse_plain_redirect)
    return session
