import torch

from checker.testing import misconception


@misconception("scale", "The factor was added where it should multiply.")
def scale__added(x, factor=2.0):
    return x + factor


@misconception("weights", "exp overflows for large values: shift by the maximum first.")
def weights__no_shift(x):
    return torch.exp(x) / torch.exp(x).sum()


@misconception("weights", "These are the exponentials, which do not sum to one yet.")
def weights__not_normalized(x):
    return torch.exp(x - x.max())
