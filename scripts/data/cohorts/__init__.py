# SPDX-License-Identifier: Apache-2.0
"""The layouts of known data sets."""
