import torch


def scale(x, factor=2.0):
    return x + factor


def weights(x):
    print("summing", x.sum())
    return torch.einsum("i,->i", torch.exp(x), 1 / torch.exp(x).sum())


def halve(x):
    return x / 3
