"""Case 50: an argument was renamed."""

import torch


def scale(x, by):
    return x * by


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
