"""Day 1: scaling."""

import torch
from torch import Tensor


def scale(x: Tensor, factor: float = 2.0) -> Tensor:
    """Multiply every element of x (any shape) by `factor`; same shape, dtype and device."""
    raise NotImplementedError


def weights(x: Tensor) -> Tensor:
    """Positive weights (N,) that sum to one, proportional to exp(x), finite for any finite x (N,)."""
    raise NotImplementedError


def halve(x: Tensor) -> Tensor:
    """Half of x, without a new storage larger than x; same shape and dtype."""
    raise NotImplementedError
