# SPDX-License-Identifier: Apache-2.0
"""The student, the teachers' architectures that MONAI does not have, and what aligns their features."""

from scripts.networks.adapters import ChannelAdapter as ChannelAdapter
from scripts.networks.alignment import AlignmentHeader as AlignmentHeader
from scripts.networks.h_denseformer import HDenseFormer as HDenseFormer
from scripts.networks.modality_dropout import ModalityDropout as ModalityDropout
from scripts.networks.nnunet import NNUNet as NNUNet
from scripts.networks.selective_fusion import SelectiveFusion as SelectiveFusion
from scripts.networks.semantic_autoencoder import SemanticAutoEncoder as SemanticAutoEncoder
from scripts.networks.space_channel import CascadeFusion as CascadeFusion
from scripts.networks.space_channel import SpaceChannelCascade as SpaceChannelCascade
from scripts.networks.student import Student as Student
from scripts.networks.uxnet import UXNet as UXNet
