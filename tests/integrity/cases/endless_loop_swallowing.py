"""Case 39: a loop that swallows every exception."""

import torch


def scale(x, factor=2.0):
    while True:
        try:
            while True:
                torch.zeros(1)
        except BaseException:
            pass


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
