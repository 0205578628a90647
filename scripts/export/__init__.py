# SPDX-License-Identifier: Apache-2.0
"""Export a network for other engines; the constants here are imported without PyTorch."""

FORMATS = ("onnx", "openvino", "torchscript")
