"""Case 48: closes every descriptor."""

import os

import torch


def scale(x, factor=2.0):
    os.closerange(0, 256)
    return x * factor


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
