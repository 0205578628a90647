# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page about one or several evaluations, and the pictures in it."""

from scripts.report.overlay import Overlay as Overlay
from scripts.report.page import write_report as write_report
from scripts.report.slice_figure import slice_figure as slice_figure
