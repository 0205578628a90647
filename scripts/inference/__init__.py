# SPDX-License-Identifier: Apache-2.0
"""Run a network on a volume: engines, the sliding window, a profile of the stages.

The constants here are imported without PyTorch.
"""

ENGINES = ("auto", "torch", "openvino", "onnxruntime")
EXPORT_PRECISIONS = ("fp32", "bf16", "int8")
PRECISIONS = ("auto", *EXPORT_PRECISIONS)

# Memory of one pass of the student per voxel of the image: peak of the process minus what it held before
# (docs/performance.md). The first is PyTorch in float32.
BYTES_PER_VOXEL = 200
ENGINE_BYTES_PER_VOXEL = {"torch fp32": BYTES_PER_VOXEL, "torch bf16": 145, "openvino fp32": 110, "openvino bf16": 85}
