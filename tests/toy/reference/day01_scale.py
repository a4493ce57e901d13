"""Scaling and weights."""

from torch import Tensor


def scale(x: Tensor, factor: float = 2.0) -> Tensor:
    """x times factor."""
    return x * factor


def weights(x: Tensor) -> Tensor:
    """exp(x) normalized, shifted by its maximum first."""
    e = (x - x.max()).exp()
    return e / e.sum()


def halve(x: Tensor) -> Tensor:
    """Half of x."""
    return x * 0.5
