"""Case 20: changes its input so that it would agree."""

import torch


def scale(x, factor=2.0):
    x.zero_()
    return x


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
