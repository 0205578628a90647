# SPDX-License-Identifier: Apache-2.0
"""Files of a network for other engines."""
