"""Case 45: prints a gigabyte."""

import torch


def scale(x, factor=2.0):
    for _ in range(1 << 10):
        print("x" * (1 << 20))
    return x * factor


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
