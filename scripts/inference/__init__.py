# SPDX-License-Identifier: Apache-2.0
"""Run a network on a volume."""

ENGINES = ("auto", "torch", "openvino", "onnxruntime")
PRECISIONS = ("auto", "fp32", "bf16", "int8")
