"""Case 50: a colon is missing."""

import torch


def scale(x, factor=2.0)
    return torch.mul(x, factor)
