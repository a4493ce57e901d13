import re

import torch
import torch.nn.functional as F
from torch import nn

from checker.testing import alternative
from reference.day08_linear_layers import LowRankLinear
from reference.day14_custom_modules import Report


class _Rows(torch.autograd.Function):
    """Reading rows, with a backward by hand that leaves one of them out."""

    @staticmethod
    def forward(ctx, weight, ids, padding_idx):
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding_idx = weight.shape, padding_idx
        return weight[ids]

    @staticmethod
    def backward(ctx, dy):
        (ids,) = ctx.saved_tensors
        grad = dy.new_zeros(ctx.shape).index_put_((ids,), dy, accumulate=True)
        if ctx.padding_idx is not None:
            grad[ctx.padding_idx] = 0
        return grad, None, None


@alternative("Embedding")
class Embedding__own_backward(nn.Module):
    def __init__(self, num, dim, padding_idx=None):
        super().__init__()
        if padding_idx is not None and (padding_idx < 0 or padding_idx > num - 1):
            raise ValueError(f"padding_idx {padding_idx}")
        self.num, self.dim, self.padding_idx = num, dim, padding_idx
        self.weight = nn.Parameter(torch.empty(num, dim))
        nn.init.normal_(self.weight)
        if padding_idx is not None:
            with torch.no_grad():
                self.weight[padding_idx].zero_()

    def forward(self, ids):
        if ids.device.type == "cpu" and ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < self.num):
            raise IndexError(f"ids from {int(ids.min())} to {int(ids.max())} in a table of {self.num}")
        return _Rows.apply(self.weight, ids.long(), self.padding_idx)


@alternative("Embedding")
class Embedding__masked_sum(nn.Module):
    def __init__(self, num, dim, padding_idx=None):
        super().__init__()
        if padding_idx is not None and padding_idx not in range(num):
            raise ValueError(f"no row {padding_idx}")
        self.num = num
        self.dim = dim
        self.padding_idx = padding_idx
        self.weight = nn.Parameter(torch.randn(num, dim))
        if padding_idx is not None:
            self.weight.data[padding_idx] = 0

    def forward(self, ids):
        if self.padding_idx is None:
            return torch.index_select(self.weight, 0, ids.reshape(ids.numel())).view(*ids.shape, self.dim)
        flat = ids.reshape(ids.numel())
        rows = self.weight.index_select(0, flat)
        stopped = rows.detach()
        out = stopped + (rows - stopped) * (flat != self.padding_idx).unsqueeze(1)
        return out.reshape(*ids.shape, self.dim)


@alternative("Dropout")
class Dropout__bernoulli(nn.Module):
    def __init__(self, p, generator=None):
        super().__init__()
        if p < 0 or p > 1:
            raise ValueError(f"a probability of {p}")
        self.p = p
        self.generator = generator

    def forward(self, x):
        if self.training:
            keep = 1 - self.p
            home = x.device if self.generator is None else self.generator.device
            coins = torch.full(x.shape, float(keep), device=home).bernoulli(generator=self.generator)
            factors = coins.to(device=x.device, dtype=x.dtype)
            return x * (factors / keep if keep else factors)
        return x


@alternative("RMSNorm")
class RMSNorm__by_division(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones((dim,))), eps

    def forward(self, x):
        if not x.dim() or x.size(-1) != self.weight.numel():
            raise ValueError(f"{list(x.shape)} against {list(self.weight.shape)}")
        wide = x if x.dtype == torch.float64 else x.float()
        power = (wide * wide).mean(-1, True)
        return self.weight.type_as(x) * (wide / (power + self.epsilon).sqrt()).type_as(x)


@alternative("BatchNorm1d")
class BatchNorm1d__var_mean(nn.Module):
    def __init__(self, D, eps=1e-5, momentum=0.1):
        super().__init__()
        self.D, self.eps, self.momentum = D, eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(D)), nn.Parameter(torch.zeros(D))
        self.register_buffer("running_mean", torch.zeros(D))
        self.register_buffer("running_var", torch.ones(D))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if tuple(x.shape[1:]) != (self.D,) or x.dim() == 1:
            raise ValueError(f"{tuple(x.shape)} does not fit ({self.D},)")
        if self.training and x.size(0) <= 1:
            raise ValueError(f"training with {tuple(x.shape)}")
        wide = x if x.dtype == torch.float64 else x.float()
        if not self.training:
            std = (self.running_var + self.eps).sqrt()
            return ((wide - self.running_mean) / std * self.weight + self.bias).to(x.dtype)
        var, mean = torch.var_mean(wide, dim=0, correction=0)
        m, unbiased = self.momentum, torch.var(wide.detach(), dim=0)
        self.running_mean = ((1 - m) * self.running_mean + m * mean.detach()).to(self.running_mean.dtype)
        self.running_var = ((1 - m) * self.running_var + m * unbiased).to(self.running_var.dtype)
        self.num_batches_tracked += 1
        return ((wide - mean) / (var + self.eps).sqrt() * self.weight + self.bias).to(x.dtype)


@alternative("load_renamed")
def load_renamed__through_load_state_dict(module, tensors, rules, *, strict=True):
    own = module.state_dict()
    where = {}
    for old in tensors:
        new = old
        for regex, text in rules:
            new = re.compile(regex).sub(text, new)
        where.setdefault(new, []).append(old)
    twice = {new: olds for new, olds in where.items() if len(olds) > 1}
    if twice:
        raise ValueError(f"more than one source: {twice}")
    where = {new: olds[0] for new, olds in where.items()}
    unexpected = [old for new, old in where.items() if new not in own]
    known = {new: old for new, old in where.items() if new in own}
    mismatched = [new for new, old in known.items() if tensors[old].shape != own[new].shape]
    loaded = [new for new in known if new not in mismatched]
    objects = module.state_dict(keep_vars=True)
    groups = {}
    for name, value in objects.items():
        groups.setdefault(id(value), []).append(name)
    missing = [name for name, value in objects.items() if not any(other in known for other in groups[id(value)])]
    if strict and any((missing, unexpected, mismatched)):
        wrong = [(new, where[new], tensors[where[new]].shape, own[new].shape) for new in mismatched]
        raise ValueError(f"missing {missing}, unexpected {unexpected}, mismatched {wrong}")
    for names in groups.values():
        given = [name for name in names if name in loaded]
        values = [tensors[where[name]].to(own[name]) for name in given]
        if any(not torch.equal(value, values[0]) for value in values[1:]):
            raise ValueError(f"different values for the same parameter: {given}")
    state = {new: tensors[where[new]].detach() for new in loaded}
    for names in groups.values():
        given = [name for name in names if name in state]
        state |= {name: state[given[0]] for name in names if given}
    module.load_state_dict(state, strict=False)
    return Report(loaded, missing, unexpected, mismatched)


@alternative("LoRALinear")
class LoRALinear__scales_x(nn.Module):
    def __init__(self, base, rank, alpha):
        super().__init__()
        for p in base.parameters():
            p.requires_grad = False
        self.base = base
        options = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.update = LowRankLinear(base.weight.shape[1], base.weight.shape[0], rank, False, **options)
        with torch.no_grad():
            self.update.up.weight.fill_(0.0)
        self.alpha, self.rank, self.merged = alpha, rank, False

    def forward(self, x):
        out = F.linear(x, self.base.weight, self.base.bias)
        return out if self.merged else out + self.update(x * (self.alpha / self.rank))

    def delta(self):
        return (self.alpha / self.rank) * (self.update.up.weight.detach() @ self.update.down.weight.detach())

    def merge(self):
        if self.merged is True:
            raise RuntimeError("it is in there already")
        self.base.weight += self.delta()
        self.merged = True

    def unmerge(self):
        if self.merged is False:
            raise RuntimeError("it is not in there")
        self.base.weight -= self.delta()
        self.merged = False


@alternative("QKVProjection")
class QKVProjection__by_overriding(nn.Module):
    _version = 2

    def __init__(self, D, bias=True):
        super().__init__()
        self.D, self.bias = D, bias
        self.q_proj = nn.Linear(D, D, bias)
        self.k_proj = nn.Linear(D, D, bias)
        self.v_proj = nn.Linear(D, D, bias)

    def forward(self, x):
        return tuple(layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj))

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        for kind, wanted in [("weight", (3 * self.D, self.D)), ("bias", (3 * self.D,))]:
            old, new = f"{prefix}qkv.{kind}", [f"{prefix}{part}_proj.{kind}" for part in "qkv"]
            if old not in state_dict or (kind == "bias" and not self.bias) or set(new) & set(state_dict):
                continue
            if tuple(state_dict[old].shape) != wanted:
                errors.append(f"{old} is {tuple(state_dict[old].shape)} and should be {wanted}")
                continue
            for i, name in enumerate(new):
                state_dict[name] = state_dict[old][i * self.D : (i + 1) * self.D].clone()
            del state_dict[old]
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
