"""Linear layers: one matrix product, its three gradients, and the variance that decides whether depth works.

The layer is y = x W^T + b with W (out, in). Random weights multiply the second moment of what comes in by
fan_in * Var(W), a relu halves it; the scales below make that product one: Glorot and Bengio 2010, equation 16
(uniform, both fans), and He et al. 2015 (arXiv:1502.01852), equations 10 and 14 (normal, one fan, with a gain).
The best matrix of a given rank is the truncated singular value decomposition (Eckart and Young 1936).
Scales for residual branches: Radford et al. 2019 (GPT-2), section 2.3.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from reference.day05_nn_module_basics import Residual

GAINS = {"linear": 1.0, "relu": math.sqrt(2.0), "tanh": 5.0 / 3.0}
ROWS = 256  # how many inputs forward_variance sends through its network
SHARE = 0.04  # of the input's second moment: what all residual branches add together


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Return x W^T + b for x (..., I), w (O, I), b (O,): all rows of x in one matrix product."""
    _check_weight(x, w)
    if b is not None and b.shape != w.shape[:1]:
        raise ValueError(f"bias {tuple(b.shape)} does not fit weight {tuple(w.shape)}")
    n_out, n_in = w.shape
    *lead, _ = x.shape
    rows = x.reshape(math.prod(lead), n_in)  # (N, I)
    y = rows @ w.T if b is None else torch.addmm(b, rows, w.T)  # (N, O)
    return y.reshape(*lead, n_out)


def linear_backward(dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients at x (..., I), w (O, I) and b (O,), given the gradient dy (..., O) at the result."""
    _check_weight(x, w)
    n_out, n_in = w.shape
    *lead, _ = x.shape
    if list(dy.shape) != [*lead, n_out]:
        raise ValueError(f"dy {tuple(dy.shape)} does not fit x {tuple(x.shape)} and weight {tuple(w.shape)}")
    dy_rows = dy.reshape(math.prod(lead), n_out)  # (N, O)
    x_rows = x.reshape(math.prod(lead), n_in)  # (N, I)
    dx = (dy_rows @ w).reshape(x.shape)  # (..., I)
    return dx, dy_rows.T @ x_rows, dy_rows.sum(dim=0)  # (O, I), (O,)


class Linear(nn.Module):
    """A layer with weight (out, in) and bias (out,), both U(-1/sqrt(in), 1/sqrt(in)) at first."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        if in_features:  # a sum over nothing is 0, and so is its bias
            bound = in_features**-0.5
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return linear(x, self.weight, self.bias)


def fan_in_fan_out(shape: Sequence[int]) -> tuple[int, int]:
    """How many inputs one output sees, and how many outputs one input reaches, for weights (O, I, *kernel)."""
    if len(shape) < 2:
        raise ValueError(f"a weight has at least an output and an input dimension, not {tuple(shape)}")
    n_out, n_in, *kernel = shape
    area = math.prod(kernel)
    return n_in * area, n_out * area


def xavier_uniform_(w: Tensor, gain: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Fill w from U(-a, a) with variance a^2 / 3 = gain^2 * 2 / (fan_in + fan_out)."""
    bound = gain * math.sqrt(6.0 / sum(fan_in_fan_out(w.shape)))
    with torch.no_grad():
        return w.uniform_(-bound, bound, generator=generator)


def kaiming_normal_(
    w: Tensor, nonlinearity: str = "relu", mode: str = "fan_in", generator: torch.Generator | None = None
) -> Tensor:
    """Fill w from N(0, gain^2 / fan), with the gain of what comes after it."""
    if nonlinearity not in GAINS:
        raise ValueError(f"nonlinearity {nonlinearity!r} is none of {', '.join(GAINS)}")
    fan_in, fan_out = fan_in_fan_out(w.shape)
    fans = {"fan_in": fan_in, "fan_out": fan_out}
    if mode not in fans:
        raise ValueError(f"mode {mode!r} is none of {', '.join(fans)}")
    with torch.no_grad():
        return w.normal_(0.0, GAINS[nonlinearity] / math.sqrt(fans[mode]), generator=generator)


def trunc_normal_(w: Tensor, std: float, bound: float = 2.0, generator: torch.Generator | None = None) -> Tensor:
    """Fill w from N(0, std^2) given that nothing lies beyond bound * std, by the inverse of its distribution."""
    edge = math.erf(bound / math.sqrt(2.0))  # the probability of what is kept
    limit = bound * std
    with torch.no_grad():
        w.uniform_(-edge, edge, generator=generator)
        return w.erfinv_().mul_(math.sqrt(2.0) * std).clamp_(-limit, limit)


def forward_variance(
    depth: int, width: int, init_: Callable[..., object], act: Callable[[Tensor], Tensor], *, seed: int
) -> Tensor:
    """The mean square after each of `depth` layers act(x W^T), for inputs from N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    moments = torch.zeros(depth)
    with torch.no_grad():
        x = torch.randn(ROWS, width, generator=generator)
        for layer in range(depth):
            w = torch.empty(width, width)
            init_(w, generator=generator)
            x = act(linear(x, w))  # (ROWS, width)
            moments[layer] = x.square().mean()
    return moments


class LowRankLinear(nn.Module):
    """A layer whose weight is the product of `up` (out, rank) and `down` (rank, in), which is never formed."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, *, device=None, dtype=None):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank ({rank}) must be at least 1")
        self.rank = rank
        self.down = Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features) through a space of `rank` numbers."""
        return self.up(self.down(x))


@torch.no_grad()
def low_rank_from(linear: nn.Module, rank: int) -> LowRankLinear:
    """The LowRankLinear nearest to a layer: the `rank` largest singular values of its weight, and its bias."""
    weight, bias = linear.weight, linear.bias
    n_out, n_in = weight.shape
    rank = min(rank, n_in, n_out)
    low = LowRankLinear(n_in, n_out, rank, bias is not None, device=weight.device, dtype=weight.dtype)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)  # (O, K), (K,), (K, I)
    low.up.weight.copy_(u[:, :rank] * s[:rank])
    low.down.weight.copy_(vh[:rank])
    if bias is not None:
        low.up.bias.copy_(bias)
    return low


def init_residual_(blocks: Iterable[Residual], depth: int, generator: torch.Generator | None = None) -> None:
    """Start the blocks of a network of `depth` of them so that all branches together add SHARE of the signal.

    Each branch adds SHARE / depth of the second moment that comes in, so that after all of them it has grown by
    (1 + SHARE / depth)^depth, about exp(SHARE). A transformer of L blocks has 2 L branches, attention and
    feed-forward: scaled by 1 / sqrt(2 L) each, they add up to the share 1, whatever L is.
    """
    for block in blocks:
        *hidden, last = block.inner.layers
        for layer in hidden:
            kaiming_normal_(layer.weight, generator=generator)
        kaiming_normal_(last.weight, "linear", generator=generator)
        with torch.no_grad():
            last.weight.mul_(math.sqrt(SHARE / depth))
            block.scale.fill_(1.0)
            for layer in block.inner.layers:
                layer.bias.zero_()


def _check_weight(x: Tensor, w: Tensor) -> None:
    if x.shape[-1:] != w.shape[1:]:
        raise ValueError(f"x {tuple(x.shape)} does not fit weight {tuple(w.shape)}")
