# SPDX-License-Identifier: Apache-2.0
"""Scores of masks, and tables of them."""
