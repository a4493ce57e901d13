"""Case 3: an exit hook that would rewrite the result."""

import atexit
import os

import torch

atexit.register(lambda: os.write(1, b"passed"))


def scale(x, factor=2.0):
    return x + factor


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
