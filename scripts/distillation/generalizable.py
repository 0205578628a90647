# SPDX-License-Identifier: Apache-2.0
"""Domain-generalisable distillation: training of the alignment headers, and the distiller that compares their codes.

Source: [paper] Qi et al., JBHI 2024, arXiv 2207.12995, as far as its abstract, figures and released networks tell;
[ours] the 3D form and the formulas, see docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.losses import DiceCELoss
from torch import nn
from torch.nn import functional

from scripts.distillation.distiller import LOGITS, Distiller
from scripts.networks import AlignmentHeader, SemanticAutoEncoder
from scripts.training.checkpoint import load_weights

CODES, TO_STUDENT, TO_TEACHER = "codes", "to_student", "to_teacher"


def header_of(network: nn.Module, window: Sequence[int], **options: Any) -> AlignmentHeader:
    """A new alignment header for a network's deepest features.

    Args:
        network: has ``encode`` and ``decode`` (``Student``, or a ``Teacher`` of H-DenseFormer, 3D UX-Net or DynUNet).
        window: ``[M, H, W, D]``, an image that it accepts.
        options: further arguments of ``AlignmentHeader``.

    Raises:
        ValueError: the network has no encoder and decoder that can be called apart.
    """
    inner = getattr(network, "network", network)
    if not (hasattr(inner, "encode") and hasattr(inner, "decode")):
        raise ValueError(
            f"{type(inner).__name__} has no encoder and decoder that can be called apart, as alignment headers need: "
            "choose hdenseformer, uxnet or dynunet as the teacher."
        )
    parameter = next(network.parameters())
    training = network.training
    with torch.no_grad():
        deepest = network.eval().encode(torch.zeros(1, *window, device=parameter.device))[-1]  # type: ignore[operator]
    network.train(training)
    return AlignmentHeader(deepest.shape[1], **options).to(parameter.device)


def intensity_view(image: torch.Tensor) -> torch.Tensor:
    """The image (``B M H W [D]``) with noise and another gain per sample and modality; absent (zero) ones stay zero."""
    shape = [*image.shape[:2], *[1] * (image.dim() - 2)]
    gain = 0.8 + 0.4 * torch.rand(shape, device=image.device)
    present = (image != 0).flatten(2).any(dim=2).view(shape)
    return image * gain + 0.05 * torch.randn_like(image) * present


def _freeze(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).eval()


class HeaderTrainer(nn.Module):
    """A frozen network with the alignment header that is to be trained on its deepest features.

    In ``train()`` ``forward(image, label)`` returns a dict for ``AlignmentLoss``; in ``eval()`` ``forward(image)``
    returns the network's logits as they are with the header's reconstruction in place of the deepest features, so that
    validation Dice tells what the code keeps.

    Args:
        network: see ``header_of``.
        window: see ``header_of``.
        classes: of the label, background included.
        weights: of the network, loaded strictly; empty: random ones (a control).
        autoencoder: weights of the semantic auto-encoder; empty: random ones.
    """

    def __init__(
        self, network: nn.Module, window: Sequence[int], classes: int, weights: str = "", autoencoder: str = ""
    ) -> None:
        super().__init__()
        if weights:
            load_weights(network, weights)
        self.network = _freeze(network)
        self.header = header_of(network, window)
        self.autoencoder = SemanticAutoEncoder(classes)
        if autoencoder:
            load_weights(self.autoencoder, autoencoder)
        _freeze(self.autoencoder)

    def train(self, mode: bool = True) -> HeaderTrainer:
        """Set the header's mode; everything else stays in eval()."""
        super().train(mode)
        self.network.eval()
        self.autoencoder.eval()
        return self

    def forward(self, image: torch.Tensor, label: torch.Tensor | None = None) -> Any:
        """``image`` ``B M H W D`` (and in train() ``label`` ``B 1 H W D``) to a dict, or to logits."""
        with torch.no_grad():
            features = self.network.encode(image)  # type: ignore[operator]
        code, reconstruction = self.header(features[-1])
        logits = self.network.decode([*features[:-1], reconstruction])  # type: ignore[operator]
        if not self.training or label is None:
            return logits
        with torch.no_grad():
            view = self.network.encode(intensity_view(image))[-1]  # type: ignore[operator]
            semantic = self.autoencoder.encode(label)  # type: ignore[operator]
        return {
            LOGITS: logits,
            "features": features[-1],
            "reconstruction": reconstruction,
            "code": code,
            "view": self.header.encode(view),
            "semantic": semantic,
        }


class AlignmentLoss(nn.Module):
    """Consistency training of an alignment header: what it keeps is the features, the label's meaning, no intensity.

    Source: [ours] formula of ACT (Qi et al., arXiv 2207.12995)::

        mean (F' - F)^2 + (1 - cos(z, z_semantic)) + S(decoder(F'), label) + mean (z(view) - z)^2

    F the deepest features, F' their reconstruction, z the code; every term is a mean over the batch, the cosine is of
    a sample's whole code. ``logged`` holds the four by name.

    Args:
        segmentation: S; by default Dice + cross-entropy.
    """

    def __init__(self, segmentation: nn.Module | None = None) -> None:
        super().__init__()
        default = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
        self.segmentation = segmentation or default
        self.logged: dict[str, float] = {}

    def forward(self, outputs: Mapping[str, torch.Tensor], label: torch.Tensor) -> torch.Tensor:
        """What ``HeaderTrainer.forward`` returned in train(), and the label ``B 1 H W D``, to a scalar."""
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
    """Codes of images, one row each, for ``scripts.metrics.FrechetSemanticDistance``.

    Args:
        network: see ``header_of``; in eval().
        header: that network's trained header.
        images: batches ``B M H W D``.
    """
    with torch.no_grad():
        return torch.cat([header.encode(network.encode(batch)[-1]).flatten(1).cpu() for batch in images])


def mask_batch(batch: Mapping[str, Any], device: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
    """``prepare_batch`` of the semantic auto-encoder: the label is its input and its target."""
    label = batch["label"].to(device=device, non_blocking=non_blocking)
    return label, label


class GeneralizableDistiller(Distiller):
    """A ``Distiller`` that also gives the codes of both networks' deepest features and the crossed predictions.

    Further taps (terms may name them like any other), in train():

    - ``codes``: ``B x (views + 1) x M`` per network, index 0 the image itself, then its intensity views;
    - ``to_student``: the teacher's code through the student's header and the student's decoder, against the teacher's
      logits; it trains the student's decoder only;
    - ``to_teacher``: the student's code through the teacher's header and the teacher's decoder, against the teacher's
      logits; it trains the student's encoder only.

    Teachers, headers and their codes never receive a gradient.

    Args:
        student, teachers, taps, adapters, window: see ``Distiller``; the networks must have ``encode`` and ``decode``.
        headers_dir: folder of ``header_student/model.pt`` and ``header_<teacher>/model.pt``; None: random headers.
        views: intensity views of each image, at least 1; below 3 the complete graph has a single edge per row, and
            nothing to say.

    Raises:
        ValueError: a teacher without ``encode`` and ``decode``; fewer than one view.
        FileNotFoundError: a header's weights are missing.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Mapping[str, nn.Module],
        taps: Mapping[str, Any] | None = None,
        adapters: Mapping[str, Any] | None = None,
        window: Sequence[int] | None = None,
        headers_dir: str | None = None,
        views: int = 3,
    ) -> None:
        super().__init__(student, teachers, taps, adapters, window)
        if window is None or views < 1:
            raise ValueError("A GeneralizableDistiller needs the window's shape and at least one view.")
        self.views = views
        networks = {"student": student, **teachers}
        self.headers = nn.ModuleDict({name: header_of(network, window) for name, network in networks.items()})
        for name, header in self.headers.items():
            if headers_dir:
                load_weights(header, Path(headers_dir) / f"header_{name}" / "model.pt")
        _freeze(self.headers)

    @property
    def tap_names(self) -> tuple[str, ...]:
        """Names that a term's ``tap`` may have."""
        return (*super().tap_names, CODES, TO_STUDENT, TO_TEACHER)

    def teachers_of(self, tap: str) -> tuple[str, ...]:
        """Names of the teachers that a tap is for."""
        return self.teacher_names if tap in (CODES, TO_STUDENT, TO_TEACHER) else super().teachers_of(tap)

    def train(self, mode: bool = True) -> GeneralizableDistiller:
        """Set the mode of the student and its adapters; teachers and headers stay in eval()."""
        super().train(mode)
        self.headers.eval()
        return self

    def forward(
        self,
        image: torch.Tensor,
        presence: torch.Tensor | None = None,
        cached: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """See ``Distiller.forward``; in train() with the outputs of the further taps."""
        outputs = super().forward(image, presence, cached)
        if not isinstance(outputs, dict):
            return outputs
        views = torch.cat([image, *(intensity_view(image) for _ in range(self.views))])
        mine, codes = self._codes("student", self.student, views)
        outputs[f"student.{CODES}"] = codes
        for name, teacher in self.teachers.items():
            with torch.no_grad():
                theirs, outputs[f"{name}.{CODES}"] = self._codes(name, teacher, views)
            outputs |= self._crossed(name, mine, theirs, len(image))
            outputs[f"{name}.{TO_STUDENT}"] = outputs[f"{name}.{TO_TEACHER}"] = outputs[f"{name}.{LOGITS}"]
        return outputs

    def _codes(self, name: str, network: Any, views: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """A network's features of all views, and its codes as ``B x (views + 1) x M``."""
        features = list(network.encode(views))
        code = self.headers[name].encode(features[-1]).flatten(1)  # type: ignore[operator]
        return features, code.unflatten(0, (self.views + 1, -1)).transpose(0, 1)

    def _crossed(
        self, name: str, mine: list[torch.Tensor], theirs: list[torch.Tensor], batch: int
    ) -> dict[str, torch.Tensor]:
        """Each network's decoder on the other's code; the first ``batch`` features are those of the image itself."""
        mine, theirs = [x[:batch] for x in mine], [x[:batch] for x in theirs]
        student, teacher = self.headers["student"], self.headers[name]
        to_student = self._translated(theirs[-1], teacher, student, mine[-1])
        to_teacher = self._translated(mine[-1], student, teacher, theirs[-1])
        # The skips are cut off, so that the teacher's code teaches the student's decoder and nothing else.
        skips = [x.detach() for x in mine[:-1]]
        return {
            f"student.{TO_STUDENT}@{name}": self.student.decode([*skips, to_student]),  # type: ignore[operator]
            f"student.{TO_TEACHER}@{name}": self.teachers[name].decode([*theirs[:-1], to_teacher]),  # type: ignore[operator]
        }

    @staticmethod
    def _translated(features: torch.Tensor, source: Any, target: Any, like: torch.Tensor) -> torch.Tensor:
        """Features of one network as another's: through the code that both headers share."""
        translated: torch.Tensor = target.decode(source.encode(features), like.shape[2:])
        return translated
