"""Case 52: another shape."""

import torch


def scale(x, factor=2.0):
    return (x * factor).unsqueeze(0)


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
