"""Case 42: recursion without end."""

import torch


def scale(x, factor=2.0):
    return scale(x, factor)


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
