"""Case 13: the oracle becomes the learner's function."""

import torch

torch.softmax = lambda x, dim: x


def scale(x, factor=2.0):
    return x * factor


def weights(x):
    return x


def halve(x):
    return x / 2
