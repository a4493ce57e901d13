"""Case 43: memory that grows without end."""

import torch


def scale(x, factor=2.0):
    kept = []
    while True:
        kept.append(torch.ones(4_000_000))


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
