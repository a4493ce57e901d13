"""Case 46: input() left in."""

import torch


def scale(x, factor=2.0):
    input("factor? ")
    return x * factor


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
