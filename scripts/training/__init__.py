# SPDX-License-Identifier: Apache-2.0
"""Handlers and inferers of a training: checkpoints, learning curves, tracking, mixed precision."""
