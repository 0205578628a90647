# SPDX-License-Identifier: Apache-2.0
"""What a training does beside its steps."""
