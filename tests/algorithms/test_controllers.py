"""Weights that adapt."""

import pytest

from coterie.algorithms.controllers import adapted_entropy_weight, adapted_kl_weight


def test_the_kl_weight_goes_up_above_its_target_and_down_below():
    assert adapted_kl_weight(0.1, 0.02, target=0.02, rate=0.5) == 0.1
    assert adapted_kl_weight(0.1, 0.022, target=0.02, rate=0.5) == pytest.approx(0.1 * 1.25)
    assert adapted_kl_weight(0.1, 9.0, target=0.02, rate=0.5) == pytest.approx(0.15)
    assert adapted_kl_weight(0.1, 0.0, target=0.02, rate=0.5) == pytest.approx(0.05)


def test_the_entropy_weight_grows_with_the_lack_and_is_positive():
    assert adapted_entropy_weight(0.01, 0.3, target=0.5, rate=0.1) == pytest.approx(0.03)
    assert adapted_entropy_weight(0.01, 0.9, target=0.5, rate=0.1) == 0
