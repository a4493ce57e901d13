"""Case 1: leaves with status 0 inside a test."""

import os

import torch


def scale(x, factor=2.0):
    os._exit(0)


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
