# SPDX-License-Identifier: Apache-2.0
"""Distillation losses: ``forward(student, teacher[, label]) -> scalar``, without parameters."""

from scripts.losses.attention_map import AttentionMapLoss as AttentionMapLoss
from scripts.losses.soft_prediction import SoftPredictionLoss as SoftPredictionLoss
