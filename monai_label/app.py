# SPDX-License-Identifier: Apache-2.0
"""``main.py`` of the MONAI Label app: MONAI's own app for bundles, which says in one sentence what it cannot do.

MONAI's own lies beside it as ``monaibundle.py``, see ``monai_label/install.py``.
"""

from __future__ import annotations

import os
from typing import Any

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # Beside a PyTorch for CPUs, PyPI's torchvision cannot load its operators; that their names are known is enough.
    OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # which forgets them when it is gone
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import monaibundle
from fastapi import HTTPException
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.exception import MONAILabelException

REFUSALS = (ValueError, OSError)  # what the bundle raises where a file or a setting is at fault


class BundleApp(monaibundle.MyApp, MONAILabelApp):
    """MONAI's app; what the bundle refuses reaches the viewer, which would read of an internal error otherwise."""

    def infer(self, request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        """A mask.

        Raises:
            HTTPException: 404 where the store does not know the study, 422 where the request or a file of the study is
                at fault, 500 where it is anything else, such as the weights.
        """
        image = request.get("image")
        if isinstance(image, str) and not os.path.exists(image) and not self.datastore().get_image_uri(image):
            raise HTTPException(404, f"The store has no study named '{image}'.")
        try:
            return super().infer(request, datastore)  # type: ignore[no-any-return]
        except MONAILabelException as error:
            raise HTTPException(422, str(error.msg)) from error
        except REFUSALS as error:
            raise HTTPException(422, _sentence(error)) from error
        except Exception as error:
            made = f"No mask was made with the weights {self.model_file(request['model'])} ({_sentence(error)})."
            raise HTTPException(500, f"{made} Put the right file in its place, or read the server's log.") from error

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        """Train. Raises HTTPException 500 with the cause, which the errors of MONAI's configs would hide."""
        try:
            return super().train(request)  # type: ignore[no-any-return]
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ and not isinstance(cause, REFUSALS):
                cause = cause.__cause__
            raise HTTPException(500, f"The training failed: {_sentence(cause)}") from None


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:500] if isinstance(error, REFUSALS) else f"{type(error).__name__}: {text[:300]}"
