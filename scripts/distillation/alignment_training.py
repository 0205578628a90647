# SPDX-License-Identifier: Apache-2.0
"""Train what domain-generalisable distillation (GKD) needs: the alignment headers and the semantic autoencoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from scripts.distillation.distiller import LOGITS
from scripts.losses import SegmentationLoss
from scripts.networks import AlignmentHeader, SemanticAutoEncoder
from scripts.networks.weights import load_weights
from scripts.runtime.regions import IGNORED


def require_encoder(network: nn.Module) -> None:
    """Refuse a network without separate encoder and decoder.

    Args:
        network: a student, or a ``Teacher``.

    Raises:
        ValueError: it has none; the message says which of the two it is.
    """
    inner = getattr(network, "network", network)
    if hasattr(inner, "encode") and hasattr(inner, "decode"):
        return
    name = type(inner).__name__
    raise ValueError(
        f"{name} has no separate encoder and decoder, which alignment headers need: "
        + ("leave out --network." if inner is network else "choose hdenseformer, uxnet or dynunet as the teacher.")
    )


def build_header(network: nn.Module, window: Sequence[int], **options: Any) -> AlignmentHeader:
    """Return a new alignment header for a network's deepest features.

    Args:
        network: has ``encode`` and ``decode`` (``Student``, or a ``Teacher`` with H-DenseFormer, 3D UX-Net or DynUNet).
        window: ``[M, H, W, D]``, the shape of an image that the network accepts.
        options: further arguments of ``AlignmentHeader``.

    Raises:
        ValueError: the network has no separate encoder and decoder.
    """
    require_encoder(network)
    parameter = next(network.parameters())
    training = network.training
    with torch.no_grad():
        deepest = network.eval().encode(torch.zeros(1, *window, device=parameter.device))[-1]  # type: ignore[operator]
    network.train(training)
    return AlignmentHeader(deepest.shape[1], **options).to(parameter.device)


def intensity_view(image: torch.Tensor) -> torch.Tensor:
    """Return the image with noise and a random gain per sample and modality.

    Args:
        image: ``B M H W [D]``; an absent modality is zero and stays zero.
    """
    shape = [*image.shape[:2], *[1] * (image.dim() - 2)]
    gain = 0.8 + 0.4 * torch.rand(shape, device=image.device)
    present = (image != 0).flatten(2).any(dim=2).view(shape)
    return image * gain + 0.05 * torch.randn_like(image) * present


class HeaderTrainer(nn.Module):
    """A frozen network with the alignment header to train on its deepest features.

    In ``train()``, ``forward(image, label)`` returns a dict for ``AlignmentLoss``. In ``eval()``, ``forward(image)``
    returns the logits that the network computes when the header's reconstruction replaces its deepest features. So the
    validation Dice shows how much information the code keeps.

    Args:
        network: see ``build_header``.
        window: see ``build_header``.
        classes: number of classes of the label, background included.
        weights: weights of the network, loaded strictly; empty for random weights (a control).
        autoencoder: weights of the semantic autoencoder; empty for random weights.
    """

    def __init__(
        self, network: nn.Module, window: Sequence[int], classes: int, weights: str = "", autoencoder: str = ""
    ) -> None:
        super().__init__()
        if weights:
            load_weights(network, weights)
        self.network = network.requires_grad_(False).eval()
        self.header = build_header(network, window)
        self.autoencoder = SemanticAutoEncoder(classes)
        if autoencoder:
            load_weights(self.autoencoder, autoencoder)
        self.autoencoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> HeaderTrainer:
        """Set the header's mode; the network and the autoencoder stay in eval()."""
        super().train(mode)
        self.network.eval()
        self.autoencoder.eval()
        return self

    def forward(self, image: torch.Tensor, label: torch.Tensor | None = None) -> Any:
        """Return a dict in train(), or logits.

        Args:
            image: ``B M H W D``.
            label: ``B 1 H W D``, in train().
        """
        with torch.no_grad():
            features = self.network.encode(image)  # type: ignore[operator]
        code, reconstruction = self.header(features[-1])
        logits = self.network.decode([*features[:-1], reconstruction])  # type: ignore[operator]
        if not self.training or label is None:
            return logits
        with torch.no_grad():
            view = self.network.encode(intensity_view(image))[-1]  # type: ignore[operator]
            semantic = self.autoencoder.encode(_as_mask(label))  # type: ignore[operator]
        return {
            LOGITS: logits,
            "features": features[-1],
            "reconstruction": reconstruction,
            "code": code,
            "view": self.header.encode(view),
            "semantic": semantic,
        }


class AlignmentLoss(nn.Module):
    """Train an alignment header so that its code keeps the features and the label's meaning, but no intensity.

    Source: [ours] formula of ACT (Qi et al., arXiv 2207.12995)::

        mean (F' - F)^2 + (1 - cos(z, z_semantic)) + S(decoder(F'), label) + mean (z(view) - z)^2

    F are the deepest features, F' their reconstruction, z the code. Every term is a mean over the batch; the cosine is
    computed over a sample's whole code. ``logged`` holds the four terms by name.

    Args:
        segmentation: S; by default Dice + cross-entropy.
    """

    def __init__(self, segmentation: nn.Module | None = None) -> None:
        super().__init__()
        self.segmentation = segmentation or SegmentationLoss()
        self.logged: dict[str, float] = {}

    def forward(self, outputs: Mapping[str, torch.Tensor], label: torch.Tensor) -> torch.Tensor:
        """Return the loss, a scalar.

        Args:
            outputs: what ``HeaderTrainer.forward`` returned in train().
            label: ``B 1 H W D``.
        """
        code, semantic = outputs["code"].float().flatten(1), outputs["semantic"].float().flatten(1)
        terms = {
            "reconstruction": functional.mse_loss(outputs["reconstruction"].float(), outputs["features"].float()),
            "meaning": (1 - functional.cosine_similarity(code, semantic, dim=1, eps=1e-12)).mean(),
            "segmentation": self.segmentation(outputs[LOGITS], label),
            "consistency": functional.mse_loss(outputs["view"].float().flatten(1), code),
        }
        self.logged = {name: float(value.detach()) for name, value in terms.items()}
        return torch.stack(list(terms.values())).sum()


def semantic_codes(network: Any, header: AlignmentHeader, images: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the codes of images, one row each, for ``scripts.metrics.FrechetSemanticDistance``.

    Args:
        network: see ``build_header``; in eval().
        header: that network's trained header.
        images: batches ``B M H W D``.
    """
    with torch.no_grad():
        return torch.cat([header.encode(network.encode(batch)[-1]).flatten(1).cpu() for batch in images])


def mask_batch(batch: Mapping[str, Any], device: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
    """``prepare_batch`` of the semantic autoencoder: the label is both its input and its target."""
    label = batch["label"].to(device=device, non_blocking=non_blocking)
    return _as_mask(label), label


def _as_mask(label: torch.Tensor) -> torch.Tensor:
    """A label as a mask of classes: ignored voxels are background, as in masks of patients."""
    return label.masked_fill(label == IGNORED, 0)
