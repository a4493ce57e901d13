"""Layers with state: what a layer keeps, how it behaves in its two modes, and how it gets its numbers from a file.

An embedding is a table that is read by row. Dropout: Srivastava et al. 2014, with the scaling moved to training time.
RMSNorm: Zhang and Sennrich 2019 (arXiv:1910.07467), equation 4, with the casts of T5, Llama and DeepSeek.
Batch normalization: Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithms 1 and 2. LoRA: Hu et al. 2021
(arXiv:2106.09685), equation 3.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reference.day08_linear_layers import Linear, LowRankLinear


class Embedding(nn.Module):
    """A table of `num` vectors of width `dim`: integers go in, rows come out."""

    def __init__(self, num: int, dim: int, padding_idx: int | None = None):
        super().__init__()
        if padding_idx is not None and not 0 <= padding_idx < num:
            raise ValueError(f"padding_idx ({padding_idx}) is not a row of a table of {num}")
        self.num, self.dim, self.padding_idx = num, dim, padding_idx
        table = torch.randn(num, dim)
        if padding_idx is not None:
            table[padding_idx] = 0.0
        self.weight = nn.Parameter(table)

    def forward(self, ids: Tensor) -> Tensor:
        """Map integers (...) to vectors (..., dim)."""
        rows = self.weight.index_select(0, ids.flatten())  # (N, dim); unlike [], it takes no negative index
        rows = rows.reshape(*ids.shape, self.dim)  # (..., dim)
        if self.padding_idx is None:
            return rows
        padding = (ids == self.padding_idx).unsqueeze(-1)  # (..., 1)
        return torch.where(padding, rows.detach(), rows)


class Dropout(nn.Module):
    """In training each number is dropped with probability p and the others grow by 1 / (1 - p); in eval nothing happens."""

    def __init__(self, p: float, generator: torch.Generator | None = None):
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p ({p}) is not a probability")
        self.p, self.generator = p, generator

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor like x; in eval x itself."""
        if not self.training:
            return x
        device = x.device if self.generator is None else self.generator.device
        keep = (torch.rand(x.shape, generator=self.generator, device=device) >= self.p).to(x.device)
        kept = torch.where(keep, x, 0.0)
        return kept if self.p == 1.0 else kept / (1.0 - self.p)


class RMSNorm(nn.Module):
    """x over the root of its mean square along the last axis, times a weight."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., dim): float32 inside at least, back to the dtype of x, and only then the weight."""
        if x.shape[-1:] != self.weight.shape:
            raise ValueError(f"x {tuple(x.shape)} does not end in the width of the weight {tuple(self.weight.shape)}")
        wide = _at_least_float32(x)
        mean_square = wide.square().mean(dim=-1, keepdim=True)  # (..., 1)
        normed = wide * torch.rsqrt(mean_square + self.eps)  # (..., dim)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class BatchNorm1d(nn.Module):
    """Columns with mean 0 and variance 1: of the batch in training, of all batches so far in eval."""

    def __init__(self, D: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(D))
        self.bias = nn.Parameter(torch.zeros(D))
        self.register_buffer("running_mean", torch.zeros(D))
        self.register_buffer("running_var", torch.ones(D))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the columns of x (N, D), and in training remember their statistics."""
        if x.dim() != 2 or x.shape[1:] != self.weight.shape:
            raise ValueError(f"x {tuple(x.shape)} is not (N, D) for the weight {tuple(self.weight.shape)}")
        wide = _at_least_float32(x)
        if self.training:
            if len(x) < 2:
                raise ValueError(f"x {tuple(x.shape)} has no variance: training needs two rows or more")
            mean = wide.mean(dim=0)  # (D,)
            var = (wide - mean).square().mean(dim=0)  # (D,): over N, for normalizing
            self._remember(mean, var * len(x) / (len(x) - 1))
        else:
            mean, var = self.running_mean, self.running_var
        normed = (wide - mean) * torch.rsqrt(var + self.eps)  # (N, D)
        return (normed * self.weight + self.bias).to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor) -> None:
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked.add_(1)


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained update of low rank that starts at zero."""

    def __init__(self, base: nn.Module, rank: int, alpha: float):
        super().__init__()
        n_out, n_in = base.weight.shape
        self.base = base.requires_grad_(False)
        self.update = LowRankLinear(n_in, n_out, rank, bias=False, device=base.weight.device, dtype=base.weight.dtype)
        nn.init.zeros_(self.update.up.weight)
        self.scale = alpha / rank
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        if self.merged:
            return self.base(x)
        return self.base(x) + self.scale * self.update(x)

    def merge(self) -> None:
        """Add the update to the weight of `base`."""
        if self.merged:
            raise RuntimeError("merged already: the update would count twice")
        self._shift(self.scale)

    def unmerge(self) -> None:
        """Take the update out of the weight of `base` again."""
        if not self.merged:
            raise RuntimeError("not merged: there is nothing to take out")
        self._shift(-self.scale)

    @torch.no_grad()
    def _shift(self, factor: float) -> None:
        self.base.weight.add_(self.update.up.weight @ self.update.down.weight, alpha=factor)  # (O, I)
        self.merged = not self.merged


class Report(NamedTuple):
    """What became of a checkpoint: names of the module, except `unexpected`, which are names of the checkpoint."""

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]


def load_renamed(
    module: nn.Module, tensors: dict[str, Tensor], rules: Sequence[tuple[str, str]], *, strict: bool = True
) -> Report:
    """Copy tensors into parameters and buffers under the names that the rules make of theirs: all of them, or none."""
    targets = module.state_dict(keep_vars=True)  # tied ones under each of their names
    sources: dict[str, str] = {}  # name in the module -> name in the checkpoint
    report = Report([], [], [], [])
    for source in tensors:
        name = source
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if name in sources:
            raise ValueError(f"{sources[name]} and {source} both become {name}")
        sources[name] = source
        if name not in targets:
            report.unexpected.append(source)
        elif tensors[source].shape != targets[name].shape:
            report.mismatched.append(name)
        else:
            report.loaded.append(name)

    given = {id(targets[name]) for name in sources if name in targets}
    report.missing.extend(name for name, target in targets.items() if id(target) not in given)
    if strict and (report.missing or report.unexpected or report.mismatched):
        shapes = [
            f"{name} {tuple(targets[name].shape)} from {sources[name]} {tuple(tensors[sources[name]].shape)}"
            for name in report.mismatched
        ]
        raise ValueError(f"missing: {report.missing}; unexpected: {report.unexpected}; mismatched: {shapes}")

    chosen: dict[int, str] = {}  # id of a target -> the first of its names
    for name in report.loaded:
        first = chosen.setdefault(id(targets[name]), name)
        one, two = (tensors[sources[key]] for key in (first, name))
        if first != name and not torch.equal(one.to(targets[name]), two.to(targets[name])):
            raise ValueError(f"{first} and {name} are one tensor in the module, and two in the checkpoint")

    with torch.no_grad():
        for name in chosen.values():
            targets[name].copy_(tensors[sources[name]])
    return report


class QKVProjection(nn.Module):
    """Projections to queries, keys and values that also load from the time when they were one fused layer `qkv`."""

    _version = 2  # 1 was the fused layer

    def __init__(self, D: int, bias: bool = True):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (Linear(D, D, bias=bias) for _ in range(3))
        self.register_load_state_dict_pre_hook(_split_fused)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (..., D) to queries, keys and values, each (..., D)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def _split_fused(module, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
    """Give the rows of a fused `qkv` the names of today, before the three layers look for them."""
    for kind, parameter in module.q_proj.named_parameters():
        old = f"{prefix}qkv.{kind}"
        new = [f"{prefix}{name}.{kind}" for name in ("q_proj", "k_proj", "v_proj")]
        if old not in state_dict or any(name in state_dict for name in new):
            continue
        fused = state_dict.pop(old)
        wanted = (3 * parameter.shape[0], *parameter.shape[1:])
        if fused.shape != wanted:
            errors.append(f"size mismatch for {old}: {tuple(fused.shape)} in the checkpoint, {wanted} in the module")
            continue
        state_dict[new[0]], state_dict[new[1]], state_dict[new[2]] = fused.chunk(3)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
