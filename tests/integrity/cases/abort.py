"""Case 44: aborts."""

import os

import torch


def scale(x, factor=2.0):
    os.abort()


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
