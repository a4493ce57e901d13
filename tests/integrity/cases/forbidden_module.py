"""Case 25: a module that calls the library's function."""

import torch


def scale(x, factor=2.0):
    return x * factor


def weights(x):
    return torch.nn.Softmax(0)(x)


def halve(x):
    return x / 2
