# SPDX-License-Identifier: Apache-2.0
"""FrechetSemanticDistance against closed forms and scipy's matrix square root."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch

from scripts.metrics.frechet import FrechetSemanticDistance


def samples(seed: int, n: int, mean: list[float], variance: list[float]) -> np.ndarray:
    """``n`` samples whose mean and (diagonal, n - 1) covariance are these, exactly."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    q = np.linalg.qr(x - x.mean(axis=0))[0]
    return q * np.sqrt(n - 1) * np.sqrt(variance) + mean


def random_sets(m: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    return rng.normal(size=(60, m)) @ rng.normal(size=(m, m)), rng.normal(size=(50, m)) @ rng.normal(size=(m, m)) + 0.5


def rotation(m: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(9).normal(size=(m, m)))[0]


def test_gaussians_with_diagonal_covariances_give_the_closed_form() -> None:
    """|m1 - m2|^2 + sum over axes of (s1 - s2)^2 = (1 + 4) + (1 + 1 + 16) with deviations 2, 1, 1 and 1, 2, 5."""
    first = samples(0, 40, [0, 0, 0], [4, 1, 1])
    second = samples(1, 70, [1, -2, 0], [1, 4, 25])
    result = FrechetSemanticDistance()(first, second)
    assert result["distance"] == pytest.approx(23.0, abs=1e-9)
    assert (result["n"], result["dimension"]) == ([40, 70], 3)


def test_a_pure_shift_gives_its_squared_length() -> None:
    first, _ = random_sets()
    shift = np.array([3.0, -1.0, 2.0])
    assert FrechetSemanticDistance()(first, first + shift)["distance"] == pytest.approx(14.0, abs=1e-9)


def test_one_number_per_sample_compares_means_and_deviations() -> None:
    result = FrechetSemanticDistance()(samples(0, 10, [1], [9]), samples(1, 12, [3], [1]))
    assert result["distance"] == pytest.approx(4 + 4, abs=1e-9)


def test_identical_sets_are_at_zero() -> None:
    first, _ = random_sets()
    assert FrechetSemanticDistance()(first, first.copy())["distance"] == pytest.approx(0.0, abs=1e-9)


def test_swapped_sets_have_the_same_distance() -> None:
    first, second = random_sets()
    metric = FrechetSemanticDistance()
    assert metric(first, second)["distance"] == pytest.approx(metric(second, first)["distance"], abs=1e-9)


@pytest.mark.parametrize("components", [None, 2])
def test_a_common_rotation_and_shift_change_nothing(components: int | None) -> None:
    first, second = random_sets()
    metric = FrechetSemanticDistance(components=components)
    result, moved = metric(first, second), metric(first @ rotation(3) + 5, second @ rotation(3) + 5)
    for key in ("distance", "zero"):
        assert moved[key] == pytest.approx(result[key], abs=1e-9)


def test_a_common_scale_is_squared() -> None:
    first, second = random_sets()
    metric = FrechetSemanticDistance()
    assert metric(3 * first, 3 * second)["distance"] == pytest.approx(9 * metric(first, second)["distance"])


@pytest.mark.parametrize("m", [1, 2, 5])
def test_random_sets_agree_with_the_matrix_square_root_of_scipy(m: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    first, second = random_sets(m)
    covariances = [np.cov(x.T).reshape(m, m) for x in (first, second)]
    root = linalg.sqrtm(covariances[0] @ covariances[1])
    expected = np.sum((first.mean(0) - second.mean(0)) ** 2) + np.trace(sum(covariances) - 2 * np.real(root))
    assert FrechetSemanticDistance()(first, second)["distance"] == pytest.approx(expected, abs=1e-8)


def test_flat_directions_stay_finite_and_exact() -> None:
    """Covariances of rank 1 along two axes that are at right angles: the cross term is 0."""
    line = samples(0, 30, [0], [4])
    zeros = np.zeros_like(line)
    result = FrechetSemanticDistance()(np.hstack([line, zeros, zeros]), np.hstack([zeros, line, zeros]))
    assert result["distance"] == pytest.approx(8.0, abs=1e-9)
    assert FrechetSemanticDistance()(np.ones((30, 3)), np.ones((30, 3)))["distance"] == 0.0


def test_the_zero_line_is_the_distance_between_two_halves_of_the_first_set() -> None:
    """Half of the samples at -1, half at +1 in one dimension: a half with k of 4 at +1 has the mean k / 2 - 1."""
    first = np.array([[-1.0], [1.0]] * 4)
    seen = {round(FrechetSemanticDistance(seed)(first, first)["zero"], 9) for seed in range(20)}
    # The other half has 4 - k at +1, so equal deviations and a shift of k - 2: 0, 1 or 4.
    assert seen <= {0.0, 1.0, 4.0}
    assert {0.0, 1.0} <= seen


def test_the_zero_line_depends_on_the_seed_only_and_not_on_the_second_set() -> None:
    first, second = random_sets()
    zero = FrechetSemanticDistance(3)(first, second)["zero"]
    assert FrechetSemanticDistance(3)(first, 9 * second)["zero"] == zero
    assert FrechetSemanticDistance(4)(first, second)["zero"] != zero


def test_sets_of_one_distribution_are_near_the_zero_line_and_shifted_ones_are_far_above() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(400, 4)), rng.normal(size=(400, 4))
    metric = FrechetSemanticDistance()
    same = metric(first, second)
    assert same["distance"] < 3 * same["zero"]
    assert metric(first, second + 1)["distance"] > 20 * same["zero"]


@pytest.mark.parametrize(("n", "has_zero"), [(2, False), (3, False), (4, True), (5, True)])
def test_fewer_than_four_samples_have_no_zero_line(n: int, has_zero: bool) -> None:
    result = FrechetSemanticDistance()(samples(0, n, [0], [1]), samples(1, 40, [1], [1]))
    assert (result["zero"] is not None) == has_zero
    assert result["distance"] == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(("n", "dimension"), [(40, 4), (39, 3), (20, 2), (9, 1)])
def test_few_samples_warn_and_are_projected_on_the_principal_components(n: int, dimension: int) -> None:
    """Axis-aligned sets, all means apart along the first axis: the leading components are the first axes."""
    variance = [64.0, 16.0, 4.0, 1.0]
    first, second = samples(0, n, [0, 0, 0, 0], variance), samples(1, 50, [3, 0, 0, 0], [4 * v for v in variance])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = FrechetSemanticDistance()(first, second)
    assert result["dimension"] == dimension
    assert result["distance"] == pytest.approx(9 + sum(variance[:dimension]), abs=1e-6)
    expected = [f"has {n} samples for 4 dimension(s)"] if dimension < 4 else []
    assert [str(w.message).split(",")[0].removeprefix("FrechetSemanticDistance ") for w in caught] == expected


def test_the_number_of_components_can_be_fixed() -> None:
    """Of a shift, that part counts which lies in the plane of the pooled set's two largest eigenvectors."""
    first, shift = samples(0, 50, [0, 0, 0], [25, 9, 1]), np.array([1.0, 2.0, 4.0])
    plane = np.linalg.eigh(np.cov(np.concatenate([first, first + shift]).T))[1][:, 1:]
    result = FrechetSemanticDistance(components=2)(first, first + shift)
    assert result["dimension"] == 2
    assert result["distance"] == pytest.approx(np.sum((shift @ plane) ** 2), abs=1e-9)
    assert result["distance"] < 20
    with pytest.warns(UserWarning, match="has 15 samples for 2 dimension"):
        assert FrechetSemanticDistance(components=2)(first[:15], first)["dimension"] == 2
    with pytest.raises(ValueError, match=r"components \(4\) must not exceed the codes' length \(3\)"):
        FrechetSemanticDistance(components=4)(first, first)
    with pytest.raises(ValueError, match="components must be at least 1, got 0"):
        FrechetSemanticDistance(components=0)


def test_long_codes_of_few_samples_work() -> None:
    rng = np.random.default_rng(0)
    with pytest.warns(UserWarning, match="has 25 samples for 1024"):
        result = FrechetSemanticDistance()(rng.normal(size=(25, 1024)), rng.normal(size=(30, 1024)))
    assert result["dimension"] == 2


def test_the_result_is_plain_numbers_and_tensors_are_read() -> None:
    first, second = random_sets()
    result = FrechetSemanticDistance()(first, second)
    assert json.loads(json.dumps(result)) == result
    assert FrechetSemanticDistance()(torch.from_numpy(first), torch.from_numpy(second)) == result


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((1, 3), (9, 3), r"at least 2 samples in each set, got \(1, 3\) and \(9, 3\)"),
        ((9, 3), (0, 3), r"at least 2 samples in each set, got \(9, 3\) and \(0, 3\)"),
        ((9, 3), (9, 4), r"with the same M, got \(9, 3\) and \(9, 4\)"),
        ((9, 3, 2), (9, 3), r"with the same M, got \(9, 3, 2\) and \(9, 3\)"),
    ],
)
def test_bad_shapes_name_both(first: tuple[int, ...], second: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrechetSemanticDistance()(np.ones(first), np.ones(second))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    codes = np.ones((30, 2))
    codes[3, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        FrechetSemanticDistance()(np.ones((30, 2)), codes)
