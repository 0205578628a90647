# SPDX-License-Identifier: Apache-2.0
"""The images of a PACS by DICOMweb: find series (QIDO-RS), fetch them (WADO-RS), store results (STOW-RS)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.image_io.dicom_packages import dicom_package
from scripts.image_io.dicom_structure import DamagedError, read_structure
from scripts.image_io.dicom_study import UNKNOWN_FOLDER, Series, is_volume_image, series_of, series_tags
from scripts.image_io.dicomweb_errors import PacsError, failure_reasons, one_sentence
from scripts.image_io.dicomweb_session import TIMEOUT, check_url, connected_session

logger = logging.getLogger(__name__)

UID = re.compile(r"[0-9]+(\.[0-9]+)*")
MAX_UID = 64  # characters
ATTEMPTS, WAIT_MS = 3, 250  # of a request that fails, and the wait before the second is twice this
ANY_SYNTAX = (("application/dicom", "*"),)  # the images as they are stored
IDENTITY = ("SOPInstanceUID", "InstanceNumber")


def is_uid(text: str) -> bool:
    """Whether a text is a DICOM UID; only such a text becomes part of a URL, or the name of a folder."""
    return len(text) <= MAX_UID and UID.fullmatch(text) is not None


class Pacs:
    """A DICOMweb server.

    Args:
        url: of the service, such as ``https://pacs.example/dicom-web``. User and password, or a token, are taken from
            the environment, see ``scripts.image_io.dicomweb_session``.

    Raises:
        PacsError: the URL is refused, see ``check_url``.
        ValueError: dicomweb-client is not installed; the environment names half a login.
    """

    def __init__(self, url: str) -> None:
        self.url = check_url(url)
        web = dicom_package("dicomweb_client.web")
        session = connected_session(self.url)
        self._client = web.DICOMwebClient(self.url, session=session, timeout=TIMEOUT)
        self._client.set_http_retry_params(max_attempts=ATTEMPTS, wait_exponential_multiplier=WAIT_MS)
        # A second attempt of dicomweb-client to store would send what is left of the first one's data.
        self._storing = web.DICOMwebClient(self.url, session=session, timeout=TIMEOUT)
        self._storing.set_http_retry_params(retry=False)

    def find_series(self, study: str, modalities: Iterable[str], keywords: Iterable[str] = ()) -> list[Series]:
        """The image series of a study by the metadata of the server; see ``dicom_study.find_series``.

        Args:
            study: its UID.
            modalities: DICOM's ``CT``, ``PT``, ``MR``: metadata of other series are not asked for.
            keywords: of DICOM elements to read from the headers, beside those that every series needs.

        Raises:
            PacsError: the server cannot be used, or has no such study, or no image series in it.
        """
        if not is_uid(study):
            raise PacsError(f"{study[:80]!r} is no DICOM UID. Give the Study Instance UID (0020,000D).")
        found = self._all_series(study)
        if not found:
            raise PacsError(f"{self.url} has no study {study}, or none that this login may see. Check the UID.")
        tags, wanted = series_tags(keywords), set(modalities)
        series = []
        for uid in sorted(uid for uid, modality in found.items() if not modality or modality in wanted):
            heads = [head for head in self._heads(study, uid, tags) if _is_volume_image(head, tags)]
            series += [series_of(heads, UNKNOWN_FOLDER, tags)] if heads else []
        if not series:
            listed = ", ".join(sorted(set(found.values()))) or "none"
            raise PacsError(
                f"The study {study} has no images of {' or '.join(sorted(wanted))}: its series are {listed}."
            )
        return series

    def _all_series(self, study: str) -> dict[str, str]:
        """The modality of each series of a study; asked for until the server has no more of them."""
        found: dict[str, str] = {}
        with one_sentence(self.url, f"find the series of the study {study}"):
            while True:
                page = self._client.search_for_series(study, fields=["Modality"], offset=len(found) or None)
                known = len(found)
                found |= {_text(each, "0020000E"): _text(each, "00080060") for each in page}
                if len(found) == known:
                    break
        valid = {uid: modality for uid, modality in found.items() if is_uid(uid)}
        if len(valid) < len(found):
            logger.warning("%s: left out %d series without a valid UID", study, len(found) - len(valid))
        return valid

    def _heads(self, study: str, series: str, tags: Sequence[str]) -> list[Any]:
        """The headers of a series' images (pydicom data sets with some elements), in the order of their numbers."""
        pydicom = dicom_package("pydicom")
        codes = {f"{pydicom.datadict.tag_for_keyword(tag):08X}" for tag in (*tags, *IDENTITY)}
        with one_sentence(self.url, f"read the metadata of the series {series}"):
            metadata = self._client.retrieve_series_metadata(study, series)
        heads = []
        for each in metadata:
            wanted = {code: value for code, value in each.items() if code in codes and "BulkDataURI" not in value}
            try:
                heads.append(pydicom.Dataset.from_json(wanted))
            except Exception:  # pydicom raises many types; a missing image is noticed when the series is read
                continue
        return sorted(heads, key=_order)

    def fetch_series(self, study: str, series: str, folder: Path) -> int:
        """Fetch every object of a series; the folder exists only if all of them arrived.

        Where the connection breaks, what is missing is fetched once more, one by one.

        Args:
            study, series: UIDs.
            folder: to create, with one file per object.

        Returns:
            The number of files.

        Raises:
            PacsError: the connection broke, or objects are missing or cut.
        """
        expected = {str(head.SOPInstanceUID) for head in self._heads(study, series, ()) if "SOPInstanceUID" in head}
        part = folder.with_name(f".{folder.name}.part")
        part.mkdir(parents=True)
        arrived: set[str] = set()
        what = f"fetch the series {series}"
        try:
            with one_sentence(self.url, what):
                for dataset in self._client.iter_series(study, series, ANY_SYNTAX):
                    arrived |= _write(dataset, part, len(arrived))
        except PacsError as error:
            if not error.broken:
                raise
            logger.warning("%s Fetching the missing ones of %d objects one by one.", error, len(expected))
        for uid in sorted(expected - arrived):
            with one_sentence(self.url, f"{what}: {len(arrived)} of {len(expected)} objects arrived"):
                arrived |= _write(self._client.retrieve_instance(study, series, uid, ANY_SYNTAX), part, len(arrived))
        missing = len(expected - arrived)
        if missing or not expected:
            raise PacsError(
                f"{self.url} gave {len(expected) - missing} of {len(expected)} objects of the series {series}. Try "
                "again, or ask for the archive to be checked."
            )
        part.rename(folder)
        return len(arrived)

    def store(self, study: str, files: Sequence[Path]) -> list[str]:
        """Store DICOM files in a study.

        Returns:
            Their SOP Instance UIDs. Storing the same files again changes nothing.

        Raises:
            PacsError: the server refused some of them, with its reasons, or does not confirm them.
        """
        pydicom = dicom_package("pydicom")
        datasets = [pydicom.dcmread(file) for file in files]
        names = {str(dataset.SOPInstanceUID): file.name for dataset, file in zip(datasets, files, strict=True)}
        with one_sentence(self.url, f"store {', '.join(names.values())} in the study {study}", names):
            answer = self._storing.store_instances(datasets, study)
        if failed := failure_reasons(answer, names):
            raise PacsError(f"{self.url} refused {failed}. What it accepted stays in the study {study}.")
        confirmed = {str(item.get("ReferencedSOPInstanceUID")) for item in answer.get("ReferencedSOPSequence", [])}
        for uid in names.keys() - confirmed:  # a server may answer with nothing but "done"
            with one_sentence(self.url, f"find {names[uid]} again"):
                if not self._client.search_for_instances(study, search_filters={"SOPInstanceUID": uid}):
                    raise PacsError(f"{self.url} does not confirm that it stored {names[uid]}. Look at its log.")
        return list(names)


def _is_volume_image(head: Any, tags: Sequence[str]) -> bool:
    try:
        values = [str(head.get(tag, "")) for tag in tags]  # raises for values of another type than the element's
        return bool(values) and is_volume_image(head)
    except Exception:  # as for files, see `find_series`
        return False


def _order(head: Any) -> tuple[float, str]:
    try:
        number = float(head.get("InstanceNumber") or 0)
    except (TypeError, ValueError):
        number = 0.0
    return number, str(head.get("SOPInstanceUID", ""))


def _text(item: Mapping[str, Any], tag: str) -> str:
    """The first value of an element in DICOM JSON, as text; empty without one."""
    value = item.get(tag, {}).get("Value") or [""]
    return str(value[0] or "")


def _write(dataset: Any, folder: Path, number: int) -> set[str]:
    """Write an object into a folder, read its structure back, and return its UID.

    Raises:
        PacsError: it is cut.
    """
    uid = str(dataset.SOPInstanceUID)
    path = folder / f"{number:06d}.dcm"
    dataset.save_as(path, enforce_file_format=True)
    try:
        structure = read_structure(path)
    except DamagedError as error:
        raise PacsError(f"The object {uid} arrived damaged (it {error}). Try again.", broken=True) from None
    if structure is None or _is_cut(dataset, structure.pixel_bytes):
        path.unlink()
        raise PacsError(f"The object {uid} arrived cut: some of its pixels are missing. Try again.", broken=True)
    return {uid}


def _is_cut(dataset: Any, pixel_bytes: int) -> bool:
    """Whether uncompressed pixel data are shorter than the header states."""
    if pixel_bytes <= 0:  # without pixel data, or compressed
        return False
    sizes = [dataset.get(keyword) for keyword in ("Rows", "Columns", "BitsAllocated")]
    if not all(isinstance(size, int) for size in sizes):
        return False
    frames, samples = (int(dataset.get(keyword) or 1) for keyword in ("NumberOfFrames", "SamplesPerPixel"))
    return pixel_bytes * 8 < sizes[0] * sizes[1] * sizes[2] * frames * samples
