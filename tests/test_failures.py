"""When two failures are the same one."""

import math

import pytest
import torch

from checker.judge.failures import same_value


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        (1.0, 1.0 + 1e-9, True),
        (1.0, 1.01, False),
        (math.inf, 8.0, False),
        (8.0, math.inf, False),
        (math.inf, math.inf, True),
        (math.nan, math.nan, True),
        (math.nan, 1.0, False),
        (1, 1.0, False),
        (True, 1, False),
        ("a", "a", True),
        ([1, "x"], [1, "x"], True),
        ([1], [1, 2], False),
        ({"a": 1.0}, {"a": 1.0}, True),
        ({"a": 1.0}, {"b": 1.0}, False),
        (torch.ones(2), torch.ones(2) * (1 + 1e-6), True),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.ones(2), torch.ones(1, 2), False),
        (torch.ones(2), torch.tensor([1.0, math.inf]), False),
        (torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 1.0]), True),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), False),
        (torch.empty(0, 3), torch.empty(0, 3), True),
        (torch.ones(1), 1.0, False),
    ],
)
def test_values_are_the_same_up_to_rounding(one, two, same):
    assert same_value(one, two) is same
