# SPDX-License-Identifier: Apache-2.0
"""Readers of known data set layouts. README.md describes how to add one."""
