# SPDX-License-Identifier: Apache-2.0
"""Data lists, splits and transforms."""

from scripts.data.case_list import datalist as datalist
from scripts.data.case_list import deal as deal
from scripts.data.case_list import require_cases as require_cases
from scripts.data.folds import fold_split as fold_split
from scripts.data.pipelines import postprocessing as postprocessing
from scripts.data.pipelines import preprocessing as preprocessing
from scripts.data.sampling import Draws as Draws
from scripts.data.training_set import training_set as training_set
from scripts.image_io.checks import Rules as Rules
