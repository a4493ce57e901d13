"""Case 43: a tensor of 400 GB."""

import torch


def scale(x, factor=2.0):
    return torch.ones(100_000_000_000) * factor


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
