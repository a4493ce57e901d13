"""Case 2: SystemExit at import."""

import sys

import torch

sys.exit(0)


def scale(x, factor=2.0):
    return x + factor


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
