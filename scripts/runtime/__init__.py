# SPDX-License-Identifier: Apache-2.0
"""From image files to a mask without PyTorch and MONAI: what the bundle's transforms and inferer share with `segment`.

Everything here works on numpy arrays and SimpleITK images. The import contracts forbid torch and monai. The constants
below are imported without numpy.
"""

ENGINES = ("auto", "torch", "openvino", "onnxruntime")
EXPORT_PRECISIONS = ("fp32", "bf16", "int8")
PRECISIONS = ("auto", *EXPORT_PRECISIONS)

GIB = 2**30
# Memory of one pass of the student per voxel of the image: peak of the process minus what it held before
# (docs/performance.md). The first is PyTorch in float32.
BYTES_PER_VOXEL = 200
ENGINE_BYTES_PER_VOXEL = {"torch fp32": BYTES_PER_VOXEL, "torch bf16": 145, "openvino fp32": 110, "openvino bf16": 85}
