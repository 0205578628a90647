# SPDX-License-Identifier: Apache-2.0
"""What the app ``monaibundle`` of MONAI Label reads of a bundle: ids of inference.json, and labels in metadata.json.

The model zoo's ``ci/verify_bundle.py`` looks for this file in the folder of each app in ``supported_apps`` of the
metadata, and checks that the bundle has every property.
"""

from monai.bundle.properties import InferProperties as InferDefaults
from monai.bundle.properties import MetaProperties as MetaDefaults
from monai.utils import BundleProperty

READ = ("preprocessing", "postprocessing", "channel_def")  # optional for MONAI, but needed by the app


def _required(properties):
    """MONAI's properties, of which the app needs some more."""
    return {
        key: {**value, BundleProperty.REQUIRED: True} if key in READ else value for key, value in properties.items()
    }


InferProperties = _required(InferDefaults)
MetaProperties = _required(MetaDefaults)
