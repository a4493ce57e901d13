"""Case 4: becomes another program that succeeds."""

import os

import torch


def scale(x, factor=2.0):
    os.execv("/bin/true", ["true"])


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
