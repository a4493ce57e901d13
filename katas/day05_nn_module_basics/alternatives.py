"""Right solutions of day 05, written another way than the reference."""

import contextlib
import copy
import re
from itertools import count

import torch
from torch import nn

from checker.testing import alternative
from reference.day05_nn_module_basics import Row


@alternative("count_parameters")
def count_by_identity(module, trainable_only=False):
    seen, total = set(), 0
    for child in module.modules():
        for parameter in child._parameters.values():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if parameter.requires_grad or not trainable_only:
                size = 1
                for n in parameter.shape:
                    size *= n
                total += size
    return total


@alternative("trainable_groups")
def groups_by_name(module):
    groups = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            groups[id(parameter)] = parameter
    return list(groups.values())


@alternative("MLP")
class MLPFromParameters(nn.Module):
    """Parameters in a container of its own, products written out."""

    class Layer(nn.Module):
        def __init__(self, n_in, n_out):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(n_out, n_in))
            self.bias = nn.Parameter(torch.zeros(n_out))

        def forward(self, x):
            return torch.einsum("...i,oi->...o", x, self.weight) + self.bias

    def __init__(self, sizes, activation=torch.relu):
        super().__init__()
        if len(sizes) <= 1:
            raise ValueError(f"got the sizes {list(sizes)}")
        self.n_in = sizes[0]
        self.layers = nn.ModuleDict()
        for i in range(len(sizes) - 1):
            self.layers[str(i)] = self.Layer(sizes[i], sizes[i + 1])
        self.act = activation

    def forward(self, x):
        if x.dim() == 0 or x.shape[-1] != self.n_in:
            raise ValueError(f"x has shape {tuple(x.shape)} but should have (..., {self.n_in})")
        h = x
        for i, layer in enumerate(self.layers.values()):
            if i > 0:
                h = self.act(h)
            h = layer(h)
        return h


@alternative("MLP")
class MLPSequential(nn.Module):
    """A Sequential that is walked by hand, with layers of the track's own kind."""

    def __init__(self, sizes, activation=torch.relu):
        super().__init__()
        if not sizes or len(sizes) == 1:
            raise ValueError(f"not enough sizes in {sizes}")
        self.layers = nn.Sequential()
        for i, n_in, n_out in zip(count(), sizes, sizes[1:], strict=False):
            layer = nn.Linear(n_in, n_out)
            self.layers.add_module(str(i), layer)
        self.activate = activation

    def forward(self, x):
        width = self.layers[0].weight.shape[1]
        if not x.shape or x.shape[-1] != width:
            raise ValueError(f"{x.shape} is not (..., {width})")
        for i in range(len(self.layers) - 1):
            x = self.activate(self.layers[i](x))
        return self.layers[-1](x)


@alternative("Standardizer")
class StandardizerByStdMean(nn.Module):
    """torch's own two-in-one, minimum against maximum, and data for assignment."""

    def __init__(self, n_features):
        super().__init__()
        self.n_features = n_features
        for name, value in (("mean", 0.0), ("std", 1.0)):
            self.register_buffer(name, torch.full((n_features,), value))

    def fit(self, x):
        x = x.detach()
        if x.ndim != 2 or x.size(1) != self.n_features or not x.size(0):
            raise ValueError(f"x is {tuple(x.shape)}; fit takes (N, {self.n_features}) with N > 0")
        wide = torch.promote_types(x.dtype, self.mean.dtype)
        std, mean = torch.std_mean(x.to(wide), dim=0, correction=0)
        std = torch.where(x.amax(0) == x.amin(0), torch.ones_like(std), std)
        self.mean[:] = mean
        self.std[:] = std
        return self

    def forward(self, x):
        if x.ndim < 1 or x.size(-1) != self.n_features:
            raise ValueError(f"x is {tuple(x.shape)}; forward takes (..., {self.n_features})")
        wide = torch.promote_types(x.dtype, self.mean.dtype)
        return torch.div(x.to(wide) - self.mean.to(wide), self.std.to(wide)).to(x.dtype)


@alternative("Standardizer")
class StandardizerInDouble(nn.Module):
    """All arithmetic in double precision, a product with the reciprocal in forward."""

    def __init__(self, n_features):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("std", torch.ones(n_features))

    def fit(self, x):
        d = self.mean.numel()
        if tuple(x.shape[1:]) != (d,) or x.shape[0] < 1:
            raise ValueError(f"({'N'}, {d}) expected, {tuple(x.shape)} given")
        with torch.no_grad():
            rows = x.double()
            mean = rows.sum(0) / rows.shape[0]
            variance = ((rows - mean) ** 2).sum(0) / rows.shape[0]
            same = (x[1:] == x[:-1]).all(0)
            variance[same] = 1.0
            self.mean.data.copy_(mean)
            self.std.data.copy_(variance**0.5)
        return self

    def forward(self, x):
        d = self.mean.numel()
        if not x.dim() or x.shape[-1] != d:
            raise ValueError(f"(..., {d}) expected, {tuple(x.shape)} given")
        return ((x.double() - self.mean.double()) * self.std.double().reciprocal()).to(x.dtype)


@alternative("Residual")
class ResidualByAddcmul(nn.Module):
    """The scale first in the table, the sum in one operation where dtypes allow it."""

    def __init__(self, inner, scale=1.0):
        super().__init__()
        self.register_parameter("scale", nn.Parameter(torch.full((), scale, dtype=torch.get_default_dtype())))
        self.add_module("inner", inner)

    def forward(self, x):
        out = self.inner(x)
        if tuple(out.shape) != tuple(x.shape):
            raise ValueError(f"x {list(x.shape)} and inner(x) {list(out.shape)} differ")
        return torch.addcmul(x, out, self.scale.to(x.dtype))


@alternative("freeze")
def freeze_by_objects(module, pattern):
    regex, names = re.compile(pattern), {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if regex.search(name):
            names.setdefault(parameter, name)
    changed = [(parameter, name) for parameter, name in names.items() if parameter.requires_grad]
    for parameter, _ in changed:
        parameter.requires_grad = False
        parameter.grad = None
    return [name for _, name in changed]


@alternative("summarize")
def summarize_with_a_stack(module, *inputs):
    rows, names = [], {}
    for name, child in module.named_modules():
        names.setdefault(child, name)

    def shapes(output):
        if torch.is_tensor(output):
            return tuple(output.size())
        return tuple(shapes(part) for part in output) if isinstance(output, (list, tuple)) else None

    def hook(child, args, output):
        params = sum({p: p.numel() for p in child.parameters()}.values())
        rows.append(Row(names[child], child.__class__.__name__, shapes(output), params))

    with contextlib.ExitStack() as stack:
        for child in names:
            stack.callback(child.register_forward_hook(hook).remove)
        stack.enter_context(torch.no_grad())
        module(*inputs)
    return rows


@alternative("functional_apply")
def apply_by_deleting(module, tensors, *args):
    """Attributes in place of table entries; the tables are put back whole."""
    tables = [(m, dict(m._parameters), dict(m._buffers)) for m in module.modules()]
    members = dict(module.named_parameters(remove_duplicate=False))
    members.update(module.named_buffers(remove_duplicate=False))
    chosen = {}
    for name, tensor in tensors.items():
        if name not in members:
            raise KeyError(f"no {name}")
        own = members[name]
        if own.shape != tensor.shape:
            raise ValueError(f"{name}: {tuple(own.shape)} is not {tuple(tensor.shape)}")
        if id(own) in chosen and chosen[id(own)] is not tensor:
            raise ValueError(f"{name} is tied to a name with another tensor")
        chosen[id(own)] = tensor
    try:
        for m, parameters, buffers in tables:
            for key, own in parameters.items():
                if id(own) in chosen:
                    m._parameters[key] = chosen[id(own)]
            for key, own in buffers.items():
                if id(own) in chosen:
                    m._buffers[key] = chosen[id(own)]
        return module.__call__(*args)
    finally:
        for m, parameters, buffers in tables:
            m._parameters.clear()
            m._parameters.update(parameters)
            m._buffers.clear()
            m._buffers.update(buffers)


@alternative("per_sample_grads")
def per_sample_by_swapped_copies(module, loss_fn, x, y):
    """vmap over a model whose tables hold stand-ins, on a copy without numbers."""
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"{tuple(x.shape)} against {tuple(y.shape)}")
    own = {name: p for name, p in module.named_parameters() if p.requires_grad}
    twin = copy.copy(module)

    def loss(values, x_i, y_i):
        return loss_fn(apply_by_deleting(twin, values, x_i.unsqueeze(0)), y_i.unsqueeze(0))

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))({k: p.detach() for k, p in own.items()}, x, y)
    return {name: grads[name] for name in own}
