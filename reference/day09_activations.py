"""Activations: values and gradients that survive both tails, and what each one keeps for backward.

The logistic family (sigmoid, its logarithm, softplus, SiLU) is written so that no exponential overflows; sigmoid
keeps its output and SiLU its input, nothing else. GELU: Hendrycks and Gimpel (2016), exact and with tanh. The gated
linear unit: Shazeer (2020), equation 5.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def relu(x: Tensor) -> Tensor:
    """Return x where it is positive, else 0; the slope at 0 is 0, and NaN stays NaN."""
    return torch.where(x <= 0, torch.zeros_like(x), x)


def leaky_relu(x: Tensor, slope: float = 0.01) -> Tensor:
    """Return x where it is positive, else slope * x; the slope at 0 is `slope`."""
    return torch.where(x > 0, x, slope * x)


class _Sigmoid(torch.autograd.Function):
    """The logistic function; its derivative is a function of its output, so the output is all it keeps."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        # both exponents are <= 0: e^x / (1 + e^x) on the left, 1 / (1 + e^-x) on the right
        y = torch.exp(x.clamp(max=0)) / (1 + torch.exp(-x.abs()))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * y * (1 - y)


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x)) with finite gradients everywhere, keeping the output only."""
    return _Sigmoid.apply(x)


def log_sigmoid(x: Tensor) -> Tensor:
    """Return log(sigmoid(x)) = min(x, 0) - log(1 + exp(-|x|)), exact in both tails."""
    # torch.minimum shares the gradient at a tie, which makes the slope at 0 the right one, 1/2
    return torch.minimum(x, torch.zeros_like(x)) - torch.log1p(torch.exp(-x.abs()))


def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """Return log(1 + exp(beta * x)) / beta, and x itself where beta * x exceeds the threshold."""
    z = beta * x
    curved = torch.log1p(torch.exp(z.clamp(max=threshold))) / beta  # the branch that is not taken stays finite
    return torch.where(z > threshold, x, curved)


def _cdf(x: Tensor) -> Tensor:
    """The distribution function of the standard normal."""
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _pdf(x: Tensor) -> Tensor:
    """The density of the standard normal."""
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Return x times the normal distribution function at x, exact ("none") or by a tanh ("tanh")."""
    if approximate == "none":
        return x * _cdf(x)
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    raise ValueError(f"approximate must be 'none' or 'tanh', not {approximate!r}")


def silu_grad(x: Tensor) -> Tensor:
    """Return the derivative of x * sigmoid(x) at x."""
    s = sigmoid(x)
    return s * (1 + x * (1 - s))


class _SiLU(torch.autograd.Function):
    """x * sigmoid(x), keeping x and computing the sigmoid once more in backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * sigmoid(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * silu_grad(x)


def silu(x: Tensor) -> Tensor:
    """Return x * sigmoid(x), keeping the input only."""
    return _SiLU.apply(x)


def gated_linear(x: Tensor, w_gate: Tensor, w_up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Return act(x w_gate^T) * (x w_up^T)."""
    if w_gate.shape != w_up.shape:
        raise ValueError(f"w_gate {tuple(w_gate.shape)} and w_up {tuple(w_up.shape)} must have one shape")
    if x.shape[-1] != w_gate.shape[1]:
        raise ValueError(f"the last axis of x {tuple(x.shape)} must be that of w_gate {tuple(w_gate.shape)}")
    gate = x @ w_gate.T  # (..., F)
    up = x @ w_up.T  # (..., F)
    return act(gate) * up


def dead_fraction(h: Tensor, tol: float = 0.0) -> float:
    """Return the share of columns of h that are above tol in no row."""
    if h.dim() != 2:
        raise ValueError(f"h must be (N, D), not {tuple(h.shape)}")
    dead = ~(h > tol).any(dim=0)  # (D,)
    return dead.sum().item() / len(dead)


class _LeanGelu(torch.autograd.Function):
    """x * cdf(x), keeping x."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * _cdf(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _TimesGeluSlope.apply(x, grad)


class _TimesGeluSlope(torch.autograd.Function):
    """grad times the derivative of GELU at x; keeps these two, and differentiates them by hand."""

    @staticmethod
    def forward(ctx, x: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(x, grad)
        return grad * (_cdf(x) + x * _pdf(x))

    @staticmethod
    def backward(ctx, outer: Tensor) -> tuple[Tensor, Tensor]:
        x, grad = ctx.saved_tensors
        curvature = _pdf(x) * (2 - x * x)
        return outer * grad * curvature, _TimesGeluSlope.apply(x, outer)


def lean_gelu(x: Tensor) -> Tensor:
    """Return the exact GELU, keeping x alone for backward, and x and the gradient for double backward."""
    return _LeanGelu.apply(x)
