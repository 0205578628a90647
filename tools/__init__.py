# SPDX-License-Identifier: Apache-2.0
"""What the repository needs and the bundle does not."""
