"""Case 52: another dtype."""

import torch


def scale(x, factor=2.0):
    return (x * factor).to(torch.float16)


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
