"""Case 18: an object that equals everything."""

import torch


class Liar:
    shape, dtype = (2, 3), torch.float32

    def __eq__(self, other):
        return True


def scale(x, factor=2.0):
    return Liar()


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
