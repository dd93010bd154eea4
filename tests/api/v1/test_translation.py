from __future__ import annotations

import pytest

from api.v1.translation import auto_epochs, default_rate


@pytest.mark.parametrize(
    ("rows", "epochs"),
    [(1, 25), (4, 25), (5, 20), (33, 3), (34, 3), (8_333, 3), (8_334, 2), (12_501, 1), (25_000, 1), (10**7, 1)],
)
def test_auto_epochs_follow_the_number_of_rows(rows: int, epochs: int) -> None:
    assert auto_epochs(rows) == epochs


@pytest.mark.parametrize(("recipe", "rate"), [(None, 2e-4), ("lit-llama-alpaca", 3e-4), ("no such", 2e-4), (3, 2e-4)])
def test_default_rate_is_that_of_the_recipe(recipe: object, rate: float) -> None:
    assert default_rate(recipe) == rate
