# SPDX-License-Identifier: Apache-2.0
"""Window presets and the colours of PET on CT."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.report.display import fuse, fused_pair, is_pet, presets


def test_presets_begin_with_the_window_of_the_network_and_follow_the_modality() -> None:
    ct = presets("CT", (-200, 300))
    assert ct[0] == ("default", -200, 300)
    windows = {name: (high - low, (low + high) / 2) for name, low, high in ct[1:]}  # width and level
    assert windows["soft tissue"] == (400, 40)
    assert windows["lung"] == (1500, -600)
    assert [tuple(preset) for preset in presets("PET", (0, 10))][:3] == [
        ("default", 0, 10), ("SUV 0 to 5", 0, 5), ("SUV 0 to 7", 0, 7),
    ]  # fmt: skip
    values = np.arange(101.0)
    assert [tuple(preset) for preset in presets("MR", (1, 99), values)] == [
        ("default", 1, 99), ("high contrast", 2, 98), ("all values", 0, 100),
    ]  # fmt: skip
    assert presets("MR", (1, 99)) == [("default", 1, 99)]


@pytest.mark.parametrize(
    ("names", "pair"), [(("MR", "CT", "PET"), ("CT", "PET")), (("CT", "MR"), None), (("PT",), None)]
)
def test_ct_and_pet_are_fused_where_both_are_there(names: tuple[str, ...], pair: tuple[str, str] | None) -> None:
    assert fused_pair(names) == pair
    assert [name for name in names if is_pet(name)] == [name for name in names if name in ("PET", "PT")]


def test_pet_is_hotter_and_less_transparent_the_higher_it_is() -> None:
    ct = np.array([[100, 100, 100, 100]], dtype=np.uint8)
    pet = np.array([[0, 85, 170, 255]], dtype=np.uint8)  # 0, 1/3, 2/3 and 1
    expected = [
        [100, 100, 100],  # CT alone
        [2 / 3 * 100 + 255 / 3, 2 / 3 * 100, 2 / 3 * 100],  # a third of red
        [100 / 3 + 255 * 2 / 3, 100 / 3 + 255 * 2 / 3, 100 / 3],  # two thirds of yellow
        [255, 255, 255],  # white
    ]
    np.testing.assert_allclose(fuse(ct, pet), [expected], atol=0.5)
