"""Case 25: takes the watcher away first."""

import sys

import torch


def scale(x, factor=2.0):
    return x * factor


def weights(x):
    sys.setprofile(None)
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
