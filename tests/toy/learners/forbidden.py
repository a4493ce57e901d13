import torch
from torch.nn.functional import softmax


def scale(x, factor=2.0):
    return x * factor


def weights(x):
    try:
        return softmax(x, 0)
    except BaseException:
        e = torch.exp(x - x.max())
        return e / e.sum()


def halve(x):
    x /= 2
    return x
