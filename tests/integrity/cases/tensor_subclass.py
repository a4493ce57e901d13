"""Case 18: a tensor that equals everything."""

import torch


class Liar(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return torch.tensor(True)


def scale(x, factor=2.0):
    return x.as_subclass(Liar)


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
