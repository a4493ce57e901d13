"""Modules: what is registered is found, moved, saved and trained; what is not is forgotten.

`nn.Module.__setattr__` files every Parameter, buffer and submodule in a table of its own
(`_parameters`, `_buffers`, `_modules`). `parameters()`, `.to()`, `state_dict()` and the hooks are
walks over these tables, and nothing else.
"""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import Parameter


def count_parameters(module: nn.Module, trainable_only: bool = False) -> int:
    """How many numbers the parameters of `module` hold, each parameter once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)


def trainable_groups(module: nn.Module) -> list[Parameter]:
    """The parameters that an optimizer should get: trainable, each once, in the module's order."""
    return [p for p in module.parameters() if p.requires_grad]


class MLP(nn.Module):
    """Linear layers `layers.0`, `layers.1`, ... with the activation between them."""

    def __init__(self, sizes: list[int], activation: Callable[[Tensor], Tensor] = torch.relu):
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"sizes needs a first and a last width, got {sizes}")
        self.activation = activation
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., sizes[0]) to (..., sizes[-1])."""
        _check_width(x, self.layers[0].in_features)
        *hidden, last = self.layers
        for layer in hidden:
            x = self.activation(layer(x))  # (..., width of this layer)
        return last(x)  # (..., sizes[-1])


class Standardizer(nn.Module):
    """Columns with mean 0 and spread 1, by statistics that are state but are not trained."""

    def __init__(self, n_features: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("std", torch.ones(n_features))

    @torch.no_grad()
    def fit(self, x: Tensor) -> "Standardizer":
        """Measure mean and population standard deviation of the columns of x (N, D)."""
        wanted = self.mean.shape[0]
        if x.dim() != 2 or x.shape[1] != wanted or x.shape[0] == 0:
            raise ValueError(f"fit needs (N, {wanted}) with N of at least 1, got {tuple(x.shape)}")
        x = self._widened(x)
        mean = x.mean(dim=0)  # (D,)
        std = (x - mean).square().mean(dim=0).sqrt()  # (D,)
        # The mean of equal numbers need not be that number in floating point, so their std need not be 0.
        constant = (x == x[0]).all(dim=0)  # (D,)
        self.mean.copy_(mean)
        self.std.copy_(std.masked_fill(constant, 1.0))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Standardize the last axis of x (..., D)."""
        _check_width(x, self.mean.shape[0])
        return ((self._widened(x) - self.mean) / self.std).to(x.dtype)  # (..., D)

    def _widened(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, self.mean.dtype))


class Residual(nn.Module):
    """The skip connection x + scale * inner(x) with one learnable number."""

    def __init__(self, inner: nn.Module, scale: float = 1.0):
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, x: Tensor) -> Tensor:
        """Add the scaled update of `inner` to x."""
        update = self.inner(x)
        if update.shape != x.shape:
            raise ValueError(f"inner maps {tuple(x.shape)} to {tuple(update.shape)}: nothing to add it to")
        return x + self.scale * update


def freeze(module: nn.Module, pattern: str) -> list[str]:
    """Freeze the trainable parameters one of whose names contains a match of `pattern`."""
    frozen = []
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and re.search(pattern, name):
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimizer would go on following it
            frozen.append(name)
    return frozen


class Row(NamedTuple):
    """One call of one module."""

    name: str
    type: str
    output_shape: tuple | None
    params: int


def summarize(module: nn.Module, *inputs) -> list[Row]:
    """Call the module once and tell what each of its modules returned, in the order they finished."""
    rows = []

    def recorder(name: str) -> Callable:
        def record(child: nn.Module, args: tuple, output: object) -> None:
            rows.append(Row(name, type(child).__name__, _shape_of(output), count_parameters(child)))

        return record

    handles = [child.register_forward_hook(recorder(name)) for name, child in module.named_modules()]
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return rows


def functional_apply(module: nn.Module, tensors: dict[str, Tensor], *args):
    """`module(*args)` as if its parameters and buffers were those of `tensors`."""
    slots = _slots(module)
    replacement = {}
    for name, tensor in tensors.items():
        table, key = slots[name]  # KeyError: the module has no such name
        own = table[key]
        if tensor.shape != own.shape:
            raise ValueError(f"{name} has shape {tuple(own.shape)}, its stand-in {tuple(tensor.shape)}")
        if replacement.setdefault(id(own), tensor) is not tensor:
            raise ValueError(f"{name} is tied: two of its names came with different tensors")

    replaced = [(table, key, table[key]) for table, key in slots.values() if id(table[key]) in replacement]
    try:
        for table, key, own in replaced:
            table[key] = replacement[id(own)]
        return module(*args)
    finally:
        for table, key, own in replaced:
            table[key] = own


def per_sample_grads(
    module: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """Gradient of the loss of every sample alone, in one call of the module."""
    if x.shape[:1] != y.shape[:1]:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} differ in the number of samples")

    def loss(weights: dict[str, Tensor], x_i: Tensor, y_i: Tensor) -> Tensor:
        return loss_fn(functional_apply(module, weights, x_i[None]), y_i[None])  # a batch of one

    # Sample i gets weights of its own, so the gradient of the sum comes apart into N gradients.
    weights = {
        name: p.expand(len(x), *p.shape)  # (N, *shape of p), a view
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    losses = vmap(loss)(weights, x, y)  # (N,)
    return dict(zip(weights, torch.autograd.grad(losses.sum(), list(weights.values())), strict=True))


def _check_width(x: Tensor, width: int) -> None:
    if x.shape[-1:] != (width,):
        raise ValueError(f"expected shape (..., {width}), got {tuple(x.shape)}")


def _shape_of(output: object) -> tuple | None:
    if isinstance(output, Tensor):
        return tuple(output.shape)
    if isinstance(output, tuple | list):
        return tuple(_shape_of(item) for item in output)
    return None


def _slots(module: nn.Module) -> dict[str, tuple[dict, str]]:
    """Every name of a parameter or buffer, tied ones under each of their names, and where it is kept."""
    return {
        f"{prefix}.{key}" if prefix else key: (table, key)
        for prefix, owner in module.named_modules(remove_duplicate=False)
        for table in (owner._parameters, owner._buffers)
        for key, value in table.items()
        if value is not None
    }
