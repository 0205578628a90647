# SPDX-License-Identifier: Apache-2.0
"""File formats: headers, checks, readers and writers."""
