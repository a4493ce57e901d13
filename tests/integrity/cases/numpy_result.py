"""Case 52: a numpy array."""

import torch


def scale(x, factor=2.0):
    return (x * factor).numpy()


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
