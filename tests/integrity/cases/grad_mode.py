"""Case 56: switches gradients off."""

import torch


def scale(x, factor=2.0):
    torch.set_grad_enabled(False)
    return x * factor


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
