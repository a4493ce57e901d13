import math

import torch

from checker.testing import alternative


@alternative("relu")
def relu__masked_fill(x):
    return x.masked_fill(x <= 0, 0.0)


@alternative("leaky_relu")
def leaky_relu__factor(x, slope=0.01):
    return x * torch.where(x > 0, torch.ones_like(x), torch.full_like(x, slope))


class _SigmoidByBranches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        small = torch.exp(-torch.abs(x))
        y = torch.where(x >= 0, torch.ones_like(x), small) / (small + 1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        y = ctx.saved_tensors[0]
        return (y - y * y) * grad


@alternative("sigmoid")
def sigmoid__by_branches(x):
    return _SigmoidByBranches.apply(x)


@alternative("log_sigmoid")
def log_sigmoid__logaddexp(x):
    return -torch.logaddexp(torch.zeros_like(x), -x)


@alternative("log_sigmoid")
def log_sigmoid__branches_with_safe_inputs(x):
    left = x < 0
    negative = torch.where(left, x, torch.zeros_like(x))
    positive = torch.where(left, torch.zeros_like(x), x)
    return torch.where(left, x - torch.log1p(torch.exp(negative)), -torch.log1p(torch.exp(-positive)))


@alternative("softplus")
def softplus__safe_inputs(x, beta=1.0, threshold=20.0):
    linear = x * beta > threshold
    inside = torch.where(linear, torch.zeros_like(x), x) * beta
    return torch.where(linear, x, inside.exp().log1p().div(beta))


@alternative("softplus")
def softplus__logaddexp(x, beta=1.0, threshold=20.0):
    z = x * beta
    return torch.where(z > threshold, x, torch.logaddexp(z.clamp(max=threshold), torch.zeros_like(z)) / beta)


@alternative("gelu")
def gelu__erfc(x, approximate="none"):
    if approximate not in ("none", "tanh"):
        raise ValueError(f"unknown mode {approximate}")
    if approximate == "tanh":
        inner = x * (1 + 0.044715 * x * x) * math.sqrt(2 / math.pi)
        return x * torch.sigmoid(2 * inner)
    return x * torch.erfc(-x * math.sqrt(0.5)) * 0.5


@alternative("gelu")
def gelu__ndtr(x, approximate="none"):
    if approximate == "none":
        return x * torch.special.ndtr(x.float() if x.dtype == torch.bfloat16 else x).to(x.dtype)
    if approximate != "tanh":
        raise ValueError(f"unknown mode {approximate}")
    return x / 2 + x / 2 * torch.tanh((x + 0.044715 * x * x * x) * (2 / math.pi) ** 0.5)


@alternative("silu_grad")
def silu_grad__two_terms(x):
    s = torch.sigmoid(x)
    return s + x * s * torch.sigmoid(-x)


class _SiLUByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * s + grad * x * s * (1 - s)


@alternative("silu")
def silu__by_hand(x):
    return _SiLUByHand.apply(x)


def _fits(x, w_gate, w_up):
    if tuple(w_up.shape) != tuple(w_gate.shape):
        raise ValueError(f"{tuple(w_gate.shape)} {tuple(w_up.shape)}")
    if w_gate.shape[1] != x.size(-1):
        raise ValueError(f"{tuple(x.shape)} {tuple(w_gate.shape)}")


@alternative("gated_linear")
def gated_linear__one_product(x, w_gate, w_up, act):
    _fits(x, w_gate, w_up)
    gate, up = torch.nn.functional.linear(x, torch.cat([w_gate, w_up])).chunk(2, dim=-1)
    return up * act(gate)


@alternative("gated_linear")
def gated_linear__einsum(x, w_gate, w_up, act):
    _fits(x, w_gate, w_up)
    return act(torch.einsum("...d,fd->...f", x, w_gate)) * torch.einsum("...d,fd->...f", x, w_up)


@alternative("dead_fraction")
def dead_fraction__mean(h, tol=0.0):
    if h.ndim != 2:
        raise ValueError(f"not (N, D): {tuple(h.shape)}")
    return (h <= tol).all(0).float().mean().item()


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, x):
        ctx.save_for_backward(grad, x)
        return grad * (0.5 * torch.erfc(-x * 0.5**0.5) + x * torch.exp(-0.5 * x**2) * (2 * math.pi) ** -0.5)

    @staticmethod
    def backward(ctx, outer):
        grad, x = ctx.saved_tensors
        density = torch.exp(-0.5 * x**2) * (2 * math.pi) ** -0.5
        slope = 0.5 * torch.erfc(-x * 0.5**0.5) + x * density
        return outer * slope, outer * grad * (2 * density - x**2 * density)


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 0.5 * x * torch.erfc(-x * 0.5**0.5)

    @staticmethod
    def backward(ctx, grad):
        return _Slope.apply(grad, *ctx.saved_tensors)


@alternative("lean_gelu")
def lean_gelu__erfc(x):
    return _Lean.apply(x)
