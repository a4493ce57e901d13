"""Case 25: the operation below the library's function."""

import torch


def scale(x, factor=2.0):
    return x * factor


def weights(x):
    return torch.ops.aten._softmax(x, 0, False)


def halve(x):
    return x / 2
