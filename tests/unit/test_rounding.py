"""Figures beside their bounds."""

import pytest

from defense_core.rounding import rounded


@pytest.mark.parametrize(
    ("value", "bound", "told"),
    [
        (0.123456, "<= 0.05", "0.1235"),
        (0.0500001, "<= 0.05", "0.0500001"),
        (0.05, "<= 0.05", "0.05"),
        (0.0499999, "<= 0.05", "0.05"),
        (0.0499999, ">= 0.05", "0.0499999"),
        (0.0500001, ">= 0.05", "0.05"),
        (0.5000001, "= 0.5", "0.5000001"),
        (30.00001, "<= 30 days", "30.00001"),
        (0.0500001, "p <= 0.05", "0.0500001"),
        (-1.00000001, ">= -1", "-1.00000001"),
        (1.00000001e-05, "<= 1e-05", "1.00000001e-05"),
        (0.0500001, "", "0.05"),
        (0.0500001, "= true", "0.05"),
        (0.0500001, "<= 1.2.3", "0.05"),
        (float("nan"), "<= 0.05", "nan"),
    ],
)
def test_no_digit_is_left_out_that_shows_the_side_of_the_bound(value: float, bound: str, told: str) -> None:
    assert rounded(value, bound) == told


def test_as_many_digits_as_asked_for() -> None:
    assert (rounded(1234.5678), rounded(1234.5678, digits=6)) == ("1235", "1234.57")
