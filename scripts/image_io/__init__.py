# SPDX-License-Identifier: Apache-2.0
"""Image files: read and check headers, read voxels (NIfTI, MetaImage, DICOM), write masks."""
