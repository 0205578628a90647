# SPDX-License-Identifier: Apache-2.0
"""Research instruments around the bundle: ``python -m benchmarks NAME``. The bundle never imports them."""
