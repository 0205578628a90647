# SPDX-License-Identifier: Apache-2.0
"""Research instruments: they import the bundle, never the reverse."""
