"""Case 22: answers the second call from memory of the first."""

import torch

cache = {}


def scale(x, factor=2.0):
    if "seen" not in cache:
        cache["seen"] = x * factor
    return (
        cache["seen"].expand(x.shape)
        if cache["seen"].shape == x.shape
        else cache["seen"].reshape(-1)[: x.numel()].reshape(x.shape)
    )


def weights(x):
    e = torch.exp(x - x.max())
    return e / e.sum()


def halve(x):
    return x / 2
