"""Case 1: leaves with status 0 while it is imported."""

import os

import torch

os._exit(0)


def scale(x, factor=2.0):
    return x + factor


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
