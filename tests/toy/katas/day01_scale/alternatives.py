import torch

from checker.testing import alternative


@alternative("scale")
def scale(x, factor=2.0):
    return torch.mul(x, factor)


@alternative("weights")
def weights(x):
    shifted = torch.exp(x.sub(torch.amax(x)))
    return shifted / torch.sum(shifted, dim=0)
