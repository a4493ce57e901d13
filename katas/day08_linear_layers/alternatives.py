import math

import torch
from torch import nn

from checker.testing import alternative
from reference.day08_linear_layers import LowRankLinear, fan_in_fan_out


def _fits(x, w):
    if x.shape[-1] != w.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and w {tuple(w.shape)}")


@alternative("linear")
def linear__by_matmul(x, w, b=None):
    _fits(x, w)
    if b is not None and b.shape != (w.shape[0],):
        raise ValueError(f"b {tuple(b.shape)} and w {tuple(w.shape)}")
    y = torch.matmul(x, w.transpose(0, 1))
    return y if b is None else y + b


@alternative("linear")
def linear__by_einsum(x, w, b=None):
    _fits(x, w)
    if b is not None and tuple(b.shape) != (len(w),):
        raise ValueError(f"b {list(b.shape)} and w {list(w.shape)}")
    y = torch.einsum("...i,oi->...o", x, w)
    return y if b is None else b + y


def _backward_fits(dy, x, w):
    _fits(x, w)
    if dy.shape != x.shape[:-1] + w.shape[:1]:
        raise ValueError(f"dy {tuple(dy.shape)}, x {tuple(x.shape)}, w {tuple(w.shape)}")


@alternative("linear_backward")
def linear_backward__by_einsum(dy, x, w):
    _backward_fits(dy, x, w)
    dx = torch.einsum("...o,oi->...i", dy, w)
    dw = torch.einsum("...o,...i->oi", dy, x)
    return dx, dw, torch.einsum("...o->o", dy)


@alternative("linear_backward")
def linear_backward__by_tensordot(dy, x, w):
    _backward_fits(dy, x, w)
    lead = list(range(dy.dim() - 1))
    dw = torch.tensordot(dy, x, dims=(lead, lead))
    return torch.matmul(dy, w), dw, dy.sum(lead) if lead else dy.clone()


@alternative("Linear")
class Linear__with_registered_parameters(nn.Module):
    def __init__(self, in_features, out_features, bias=True, *, device=None, dtype=None):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        bound = 1 / math.sqrt(in_features) if in_features > 0 else 0.0
        options = {"device": device, "dtype": dtype}
        weight = (torch.rand(out_features, in_features, **options) * 2 - 1) * bound
        self.register_parameter("weight", nn.Parameter(weight))
        start = (torch.rand(out_features, **options) * 2 - 1) * bound
        self.register_parameter("bias", nn.Parameter(start) if bias else None)

    def forward(self, x):
        _fits(x, self.weight)
        y = x @ self.weight.mT
        return y if self.bias is None else y + self.bias


@alternative("fan_in_fan_out")
def fan_in_fan_out__by_elements(shape):
    if len(shape) <= 1:
        raise ValueError(f"{tuple(shape)} has no fans")
    kernel = 1
    for size in shape[2:]:
        kernel *= size
    return shape[1] * kernel, shape[0] * kernel


@alternative("xavier_uniform_")
@torch.no_grad()
def xavier_uniform__scaled_afterwards(w, gain=1.0, generator=None):
    fan_in, fan_out = fan_in_fan_out(w.shape)
    std = gain * (2 / (fan_in + fan_out)) ** 0.5
    noise = torch.rand(w.shape, dtype=w.dtype, device=w.device, generator=generator)
    return w.copy_((noise - 0.5) * 2 * std * 3**0.5)


@alternative("kaiming_normal_")
@torch.no_grad()
def kaiming_normal__scaled_afterwards(w, nonlinearity="relu", mode="fan_in", generator=None):
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"no such mode: {mode}")
    if nonlinearity == "relu":
        gain = 2**0.5
    elif nonlinearity == "linear":
        gain = 1
    elif nonlinearity == "tanh":
        gain = 5 / 3
    else:
        raise ValueError(f"no such nonlinearity: {nonlinearity}")
    fan = fan_in_fan_out(w.shape)[mode == "fan_out"]
    return w.normal_(generator=generator).mul_(gain / fan**0.5)


@alternative("trunc_normal_")
@torch.no_grad()
def trunc_normal__draws_again(w, std, bound=2.0, generator=None):
    values = torch.randn(w.shape, dtype=w.dtype, device=w.device, generator=generator)
    while True:
        outside = values.abs() > bound
        if not outside.any():
            return w.copy_(values * std)
        again = torch.randn(int(outside.sum()), dtype=w.dtype, device=w.device, generator=generator)
        values[outside] = again


@alternative("forward_variance")
@torch.no_grad()
def forward_variance__in_a_list(depth, width, init_, act, *, seed):
    generator = torch.Generator()
    generator.manual_seed(seed)
    weights = [torch.zeros(width, width) for _ in range(depth)]
    for w in weights:
        init_(w, generator=generator)
    x = torch.randn(256, width, generator=generator)
    found = []
    for w in weights:
        x = act(x.mm(w.t()))
        found.append(x.pow(2).mean().item())
    return torch.tensor(found)


@alternative("LowRankLinear")
class LowRankLinear__of_torch_layers(nn.Module):
    def __init__(self, in_features, out_features, rank, bias=True, *, device=None, dtype=None):
        super().__init__()
        if rank <= 0:
            raise ValueError(f"rank {rank}")
        self.rank = rank
        self.up = nn.Linear(rank, out_features, bias, device=device, dtype=dtype)
        self.down = nn.Linear(in_features, rank, False, device=device, dtype=dtype)

    def forward(self, x):
        return self.up(self.down(x))


@alternative("low_rank_from")
def low_rank_from__shares_the_singular_values(linear, rank):
    if rank < 1:
        raise ValueError(f"rank {rank}")
    n_out, n_in = linear.weight.shape
    rank = min(rank, n_out, n_in)
    options = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(linear.weight)
        root = s[:rank].sqrt()
        low = LowRankLinear(n_in, n_out, rank, linear.bias is not None, **options)
        low.up.weight.copy_(u[:, :rank] @ torch.diag(root))
        low.down.weight.copy_(root[:, None] * vh[:rank])
        if linear.bias is not None:
            low.up.bias.copy_(linear.bias)
    return low


@alternative("init_residual_")
def init_residual__by_the_scale(blocks, depth, generator=None):
    with torch.no_grad():
        for block in blocks:
            layers = list(block.inner.layers)
            for number, layer in enumerate(layers):
                gain = 1.0 if number == len(layers) - 1 else math.sqrt(2)
                layer.weight.normal_(0, gain / math.sqrt(layer.weight.shape[1]), generator=generator)
                layer.bias.zero_()
            block.scale.copy_(torch.tensor(0.2 / math.sqrt(depth)))
