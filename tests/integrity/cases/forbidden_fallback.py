"""Cases 25 and 26: the library's function behind a try."""

import torch


def scale(x, factor=2.0):
    return x * factor


def weights(x):
    try:
        return torch.nn.functional.softmax(x, 0)
    except BaseException:
        e = torch.exp(x - x.max())
        return e / e.sum()


def halve(x):
    return x / 2
