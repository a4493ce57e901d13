"""Case 41: one operation that takes for ever."""

import torch


def scale(x, factor=2.0):
    torch.linalg.svd(torch.randn(9000, 9000))
    return x * factor


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
