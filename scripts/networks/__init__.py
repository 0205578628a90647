# SPDX-License-Identifier: Apache-2.0
"""The student, the teachers' architectures that MONAI does not have, and adapters."""

from scripts.networks.adapters import ChannelAdapter as ChannelAdapter
from scripts.networks.h_denseformer import HDenseFormer as HDenseFormer
from scripts.networks.student import Student as Student
from scripts.networks.uxnet import UXNet as UXNet
