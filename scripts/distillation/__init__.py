# SPDX-License-Identifier: Apache-2.0
"""Teachers teach a student."""
