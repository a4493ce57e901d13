"""Case 56: changes the default dtype."""

import torch


def scale(x, factor=2.0):
    torch.set_default_dtype(torch.float64)
    return x * factor


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
