# SPDX-License-Identifier: Apache-2.0
"""Tools for maintainers of the repository. The bundle does not use them."""
