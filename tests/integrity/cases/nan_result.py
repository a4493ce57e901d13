"""Case 51: NaN."""

import torch


def scale(x, factor=2.0):
    return x * float("nan")


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
