# SPDX-License-Identifier: Apache-2.0
"""Score predicted masks against reference masks, and compare several evaluations."""
