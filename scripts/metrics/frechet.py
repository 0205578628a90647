# SPDX-License-Identifier: Apache-2.0
"""Distance between two data sets in the space of semantic codes."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SAMPLES_PER_DIMENSION = 10


class FrechetSemanticDistance:
    """Frechet distance between Gaussian fits of the codes of two data sets, and its value within one of them.

    Source: [paper] Qi et al., JBHI 2024, arXiv 2207.12995, names a Frechet semantic distance of data sets;
    [ours] the estimate, with sample means m and covariances S (divisor n - 1)::

        distance = |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))
        zero     = the same between two random halves of the first set

    The estimate is biased upwards for few samples, also between samples of one distribution, so compare a distance with
    ``zero``. The halves are smaller than the sets, so ``zero`` is biased upwards too. If the smaller set has fewer than
    ten samples per dimension, a warning is given and both sets are projected onto the principal components of the
    pooled set, one per ten samples. Distances of different dimensions are not comparable.

    Args:
        seed: seed of the random halves.
        components: fixed number of principal components. None keeps all dimensions if there are ten samples per
            dimension, and otherwise one component per ten samples.

    Raises:
        ValueError: ``components`` below 1.
    """

    def __init__(self, seed: int = 0, components: int | None = None) -> None:
        if components is not None and components < 1:
            raise ValueError(f"components must be at least 1, got {components}.")
        self.seed, self.components = seed, components

    def __call__(self, first: Any, second: Any) -> dict[str, Any]:
        """Compare two sets of codes, ``n1 x M`` and ``n2 x M``.

        Returns:
            ``distance``; ``zero`` (None where the first set has fewer than 4 samples); ``n``, both sets' samples;
            ``dimension``, after the projection. Distances are in squared units of the codes.

        Raises:
            ValueError: the sets are not two matrices with the same M, one has fewer than 2 samples, a value is not
                finite, or ``components`` exceeds M.
        """
        a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
        _check(a, b)
        dimension = self._dimension(min(len(a), len(b)), a.shape[1])
        if dimension < a.shape[1]:
            a, b = _project(a, b, dimension)
        order = np.random.default_rng(self.seed).permutation(len(a))
        halves = a[order[: len(a) // 2]], a[order[len(a) // 2 :]]
        return {
            "distance": _distance(a, b),
            "zero": _distance(*halves) if len(a) >= 4 else None,
            "n": [len(a), len(b)],
            "dimension": a.shape[1],
        }

    def _dimension(self, n: int, available: int) -> int:
        """Number of components to keep of ``available`` for ``n`` samples; warns where there are too few samples."""
        if self.components is not None and self.components > available:
            raise ValueError(f"components ({self.components}) must not exceed the codes' length ({available}).")
        wanted = self.components or available
        if n >= SAMPLES_PER_DIMENSION * wanted:
            return wanted
        kept = self.components or min(available, max(1, n // SAMPLES_PER_DIMENSION))
        warnings.warn(
            f"FrechetSemanticDistance has {n} samples for {wanted} dimension(s), fewer than "
            f"{SAMPLES_PER_DIMENSION} each: it compares {kept} of them. Compare the distance with its zero line.",
            stacklevel=3,
        )
        return kept


def _check(a: Array, b: Array) -> None:
    shapes = f"{a.shape} and {b.shape}"
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not a.shape[1]:
        raise ValueError(f"FrechetSemanticDistance needs two matrices (samples, M) with the same M, got {shapes}.")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"FrechetSemanticDistance needs at least 2 samples in each set, got {shapes}.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"FrechetSemanticDistance got codes of shapes {shapes} with values that are not finite.")


def _project(a: Array, b: Array, components: int) -> tuple[Array, Array]:
    """Project both sets onto the leading principal components of the pooled set."""
    pooled = np.concatenate([a, b])
    axes = np.linalg.svd(pooled - pooled.mean(axis=0), full_matrices=False)[2][:components]
    return a @ axes.T, b @ axes.T


def _root(covariance: Array) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def _distance(a: Array, b: Array) -> float:
    shift = a.mean(axis=0) - b.mean(axis=0)
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # tr (S1 S2)^(1/2) is the sum of the singular values of S1^(1/2) S2^(1/2). This way squares no rounding errors.
    cross = np.linalg.svd(_root(first) @ _root(second), compute_uv=False).sum()
    return max(0.0, float(shift @ shift + np.trace(first) + np.trace(second) - 2 * cross))
