# SPDX-License-Identifier: Apache-2.0
"""Data lists, splits and transforms."""

from scripts.data.checks import Rules as Rules
from scripts.data.draws import Draws as Draws
from scripts.data.lists import datalist as datalist
from scripts.data.lists import deal as deal
from scripts.data.lists import require_cases as require_cases
from scripts.data.splits import fold_split as fold_split
from scripts.data.transforms import postprocessing as postprocessing
from scripts.data.transforms import preprocessing as preprocessing
from scripts.data.volumes import training_set as training_set
