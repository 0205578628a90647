# SPDX-License-Identifier: Apache-2.0
"""Whole files, locks, processes and manifests."""
