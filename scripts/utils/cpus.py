# SPDX-License-Identifier: Apache-2.0
"""How many CPUs a process may use."""

from __future__ import annotations

import os


def usable_cpus() -> int:
    """The CPUs that this process may use; where the system does not tell, all of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
