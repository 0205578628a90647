# SPDX-License-Identifier: Apache-2.0
"""The ``main.py`` of the MONAI Label app: MONAI's own app for bundles, with readable errors.

``monai_label/install.py`` copies this file and renames MONAI's ``main.py`` to ``monaibundle.py``, which is imported
here.
"""

from __future__ import annotations

import os
from typing import Any

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # torchvision from PyPI cannot load its operators if PyTorch is a build for CPUs. It can be imported once their
    # names are known; they are not used. The library is kept in a constant, because its definitions end with it.
    OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import monaibundle
from fastapi import HTTPException
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.exception import MONAILabelException

INPUT_ERRORS = (ValueError, OSError)  # raised by the bundle if a file or a setting is wrong


class BundleApp(monaibundle.MyApp, MONAILabelApp):
    """MONAI's app for bundles that sends the messages of errors to the viewer.

    Without it, the viewer reports every error as an internal error of the server.
    """

    def infer(self, request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        """Segment a study.

        Raises:
            HTTPException: 404 if the store has no such study, 422 if the request or a file of the study is wrong, 500
                for all other errors, such as wrong weights.
        """
        image = request.get("image")
        if isinstance(image, str) and not os.path.exists(image) and not self.datastore().get_image_uri(image):
            raise HTTPException(404, f"The store has no study named '{image}'.")
        try:
            return super().infer(request, datastore)  # type: ignore[no-any-return]
        except MONAILabelException as error:
            raise HTTPException(422, str(error.msg)) from error
        except INPUT_ERRORS as error:
            raise HTTPException(422, _sentence(error)) from error
        except Exception as error:
            cause = _cause(error)
            if isinstance(cause, INPUT_ERRORS):  # of a config item that refuses its input
                raise HTTPException(422, _sentence(cause)) from error
            weights = self.model_file(request["model"])
            raise HTTPException(
                500,
                f"No mask was made with the weights {weights} ({_sentence(error)}). "
                "Replace this file if it is the wrong one, or see the server's log.",
            ) from error

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        """Train on the labels of the store.

        Raises:
            HTTPException: 500 with the cause of an error, instead of MONAI's error that names a config item only.
        """
        try:
            return super().train(request)  # type: ignore[no-any-return]
        except Exception as error:
            raise HTTPException(500, f"The training failed: {_sentence(_cause(error))}") from None


def _cause(error: BaseException) -> BaseException:
    """The error about the input behind an error of MONAI that names a config item only, or the first error."""
    while error.__cause__ and not isinstance(error, INPUT_ERRORS):
        error = error.__cause__
    return error


def _sentence(error: BaseException) -> str:
    """The message of an error in one line, with its type unless the bundle raised it about its input."""
    text = " ".join(str(error).split())
    return text[:500] if isinstance(error, INPUT_ERRORS) else f"{type(error).__name__}: {text[:300]}"
