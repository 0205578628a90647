# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page about one or several runs."""

from .overlay import Overlay as Overlay
from .overlay import slice_figure as slice_figure
from .page import write_report as write_report
from .tables import pick_cases as pick_cases
