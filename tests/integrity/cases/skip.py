"""Case 5: skips the test from inside."""

import pytest
import torch


def scale(x, factor=2.0):
    pytest.skip("not today")


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
