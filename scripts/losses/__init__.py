# SPDX-License-Identifier: Apache-2.0
"""Distillation losses, ``forward(student, teacher[, label]) -> scalar``, and the supervised ``SegmentationLoss``.

No loss has trainable parameters.
"""

from scripts.losses._class_regions import NO_CLASS as NO_CLASS
from scripts.losses.attention_map import AttentionMapLoss as AttentionMapLoss
from scripts.losses.channel_relation import ChannelRelationLoss as ChannelRelationLoss
from scripts.losses.channel_wise_divergence import ChannelWiseDivergence as ChannelWiseDivergence
from scripts.losses.contourlet_texture import ContourletTextureLoss as ContourletTextureLoss
from scripts.losses.contrastive_graph import ContrastiveGraphLoss as ContrastiveGraphLoss
from scripts.losses.cross_image_relation import CrossImageRelationLoss as CrossImageRelationLoss
from scripts.losses.feature_hint import FeatureHintLoss as FeatureHintLoss
from scripts.losses.hierarchical_context import HierarchicalContextLoss as HierarchicalContextLoss
from scripts.losses.intra_class_variation import IntraClassVariationLoss as IntraClassVariationLoss
from scripts.losses.memory_relation import MemoryRelationLoss as MemoryRelationLoss
from scripts.losses.multi_scale_prior import MultiScalePriorLoss as MultiScalePriorLoss
from scripts.losses.pixel_relation import PixelRelationLoss as PixelRelationLoss
from scripts.losses.prediction_correlation import DISTLoss as DISTLoss
from scripts.losses.region_affinity import RegionAffinityLoss as RegionAffinityLoss
from scripts.losses.segmentation import SegmentationLoss as SegmentationLoss
from scripts.losses.soft_prediction import SoftPredictionLoss as SoftPredictionLoss
from scripts.losses.token_ranking import TokenRankingLoss as TokenRankingLoss
