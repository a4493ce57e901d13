"""Case 16: imports the solution."""

import torch

from reference.day01_scale import scale  # noqa: F401


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
