"""Case 39: a loop that never ends."""

import torch


def scale(x, factor=2.0):
    while True:
        x = x + 0


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
