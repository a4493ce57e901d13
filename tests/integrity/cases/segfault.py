"""Case 44: reads address zero."""

import ctypes

import torch


def scale(x, factor=2.0):
    ctypes.string_at(0)
    return x * factor


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
