"""Case 52: nothing is returned."""

import torch


def scale(x, factor=2.0):
    x * factor


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
