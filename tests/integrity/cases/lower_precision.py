"""Case 27: computes in half precision and says so in the dtype."""

import torch


def scale(x, factor=2.0):
    return x.half() * factor


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
