# SPDX-License-Identifier: Apache-2.0
"""Cases: data lists, folds, preprocessing and sampling. The names below are used in configs.

They are imported at their first use, so that listing and checking cases does not load PyTorch and MONAI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scripts.utils.lazy_names import import_name

if TYPE_CHECKING:
    from scripts.data.case_list import cases_of_rank as cases_of_rank
    from scripts.data.case_list import datalist as datalist
    from scripts.data.case_list import require_cases as require_cases
    from scripts.data.folds import fold_split as fold_split
    from scripts.data.pipelines import postprocessing as postprocessing
    from scripts.data.pipelines import preprocessing as preprocessing
    from scripts.data.sampling import CaseSampler as CaseSampler
    from scripts.data.settings_check import check_settings as check_settings
    from scripts.image_io.checks import Rules as Rules

NAMES = {
    "case_list": ("cases_of_rank", "datalist", "require_cases"),
    "folds": ("fold_split",),
    "pipelines": ("postprocessing", "preprocessing"),
    "sampling": ("CaseSampler",),
    "settings_check": ("check_settings",),
    "scripts.image_io.checks": ("Rules",),
}


def __getattr__(name: str) -> Any:
    return import_name(__name__, NAMES, name)
