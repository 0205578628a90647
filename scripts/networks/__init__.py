# SPDX-License-Identifier: Apache-2.0
"""The student, teacher architectures that MONAI lacks, and adapters that align their features."""

from scripts.networks.alignment_header import AlignmentHeader as AlignmentHeader
from scripts.networks.cascade_fusion import CascadeFusion as CascadeFusion
from scripts.networks.cascade_fusion import SpaceChannelCascade as SpaceChannelCascade
from scripts.networks.channel_adapter import ChannelAdapter as ChannelAdapter
from scripts.networks.dynunet import DynUNet as DynUNet
from scripts.networks.ensemble import Ensemble as Ensemble
from scripts.networks.h_denseformer import HDenseFormer as HDenseFormer
from scripts.networks.modality_dropout import ModalityDropout as ModalityDropout
from scripts.networks.selective_fusion import SelectiveFusion as SelectiveFusion
from scripts.networks.semantic_autoencoder import SemanticAutoEncoder as SemanticAutoEncoder
from scripts.networks.student import Student as Student
from scripts.networks.unetr import UNETR as UNETR
from scripts.networks.uxnet import UXNet as UXNet
