"""Case 50: a function was renamed."""

import torch


def scales(x, factor=2.0):
    return x * factor


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
