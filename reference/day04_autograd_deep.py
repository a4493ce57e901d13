"""Reverse-mode differentiation, taken apart and put together again.

A reverse sweep needs three things: an order in which every value comes after what it was computed from, one
vector-Jacobian product per operation, and the rule that a broadcast on the way forward is a sum on the way
back. `Var` is those three in a hundred lines (Griewank and Walther, Evaluating Derivatives, section 3.2).
The second half works with torch's own engine: a custom Function that keeps no more than it needs, the meter
that shows it, and checkpointing (Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def matmul_vjp(a: Tensor, b: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients at `a` (N, K) and `b` (K, M), given the gradient (N, M) at their product `a @ b`."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} have no matrix product")
    if grad.shape != (a.shape[0], b.shape[1]):
        shapes = f"{(a.shape[0], b.shape[1])}, its gradient {tuple(grad.shape)}"
        raise ValueError(f"the product has shape {shapes}")
    return grad @ b.T, a.T @ grad  # (N, K), (K, M)


def unbroadcast(grad: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum `grad` over every dimension that broadcasting added to, or stretched in, an operand of `shape`."""
    shape = tuple(shape)
    extra = grad.ndim - len(shape)
    if extra < 0 or any(n not in (1, grad.shape[extra + i]) for i, n in enumerate(shape)):
        raise ValueError(f"shape {shape} does not broadcast to the gradient's shape {tuple(grad.shape)}")
    added = list(range(extra))
    stretched = [extra + i for i, n in enumerate(shape) if n != grad.shape[extra + i]]
    if not added + stretched:  # an empty list of dimensions would mean all of them
        return grad
    return grad.sum(added + stretched).reshape(shape)


@dataclass(eq=False)
class Node:
    """A value in a graph; `parents` are the nodes that it was computed from."""

    name: str
    parents: tuple[Node, ...] = ()


def topo_order(root: Node) -> list[Node]:
    """Every node that `root` depends on, each once and after all of its parents, `root` last."""
    order, entered = [], set()
    stack = [(root, False)]
    while stack:
        node, parents_are_done = stack.pop()
        if parents_are_done:
            order.append(node)
        elif node not in entered:
            entered.add(node)
            stack.append((node, True))
            stack.extend((parent, False) for parent in node.parents)
    return order


def _broadcast(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes fit together, compared from the right."""
    return all(n == m or 1 in (n, m) for n, m in zip(reversed(a), reversed(b), strict=False))


class Var:
    """A tensor that remembers how it was computed, and an engine that differentiates it.

    What is not a leaf has a `_vjp`, which maps the gradient at this value to one gradient per parent.
    Broadcasting is undone in `backward`.
    """

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.grad: Tensor | None = None
        self.parents: tuple[Var, ...] = ()

    def _result(self, data: Tensor, vjp: Callable[[Tensor], tuple[Tensor, ...]], *parents: Var) -> Var:
        out = type(self)(data)
        out.parents, out._vjp = parents, vjp
        return out

    def _operand(self, other: Var | float) -> Var:
        """`other` as a Var, if it is one that broadcasts with this."""
        if not isinstance(other, Var):
            return type(self)(self.data.new_tensor(other))
        a, b = tuple(self.data.shape), tuple(other.data.shape)
        if not _broadcast(a, b):
            raise ValueError(f"shapes {a} and {b} do not broadcast")
        return other

    def __add__(self, other: Var | float) -> Var:
        other = self._operand(other)
        return self._result(self.data + other.data, lambda grad: (grad, grad), self, other)

    def __mul__(self, other: Var | float) -> Var:
        other = self._operand(other)
        a, b = self.data, other.data
        return self._result(a * b, lambda grad: (grad * b, grad * a), self, other)

    def __pow__(self, exponent: int) -> Var:
        a = self.data
        if exponent == 0:  # the general rule would compute 0 * (1 / 0) at zero
            return self._result(torch.ones_like(a), lambda grad: (torch.zeros_like(a),), self)
        return self._result(a**exponent, lambda grad: (grad * exponent * a ** (exponent - 1),), self)

    def __neg__(self) -> Var:
        return self._result(-self.data, lambda grad: (-grad,), self)

    def __sub__(self, other: Var | float) -> Var:
        return self + -self._operand(other)

    def __truediv__(self, other: Var | float) -> Var:
        return self * self._operand(other) ** -1

    def __rsub__(self, other: float) -> Var:
        return self._operand(other) - self

    def __rtruediv__(self, other: float) -> Var:
        return self._operand(other) / self

    __radd__ = __add__
    __rmul__ = __mul__

    def __matmul__(self, other: Var) -> Var:
        a, b = self.data, other.data
        if min(a.ndim, b.ndim) < 2 or a.shape[-1] != b.shape[-2] or not _broadcast(a.shape[:-2], b.shape[:-2]):
            raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} have no matrix product")
        return self._result(a @ b, lambda grad: (grad @ b.mT, a.mT @ grad), self, other)

    def exp(self) -> Var:
        """The exponential of each element."""
        y = self.data.exp()
        return self._result(y, lambda grad: (grad * y,), self)

    def log(self) -> Var:
        """The natural logarithm of each element."""
        a = self.data
        return self._result(a.log(), lambda grad: (grad / a,), self)

    def relu(self) -> Var:
        """Each element, or zero where it is negative."""
        a = self.data
        return self._result(a.clamp(min=0), lambda grad: (grad * (a > 0),), self)

    def sum(self, dim: int | None = None, keepdim: bool = False) -> Var:
        """The sum over one dimension, or over all of them."""
        a = self.data

        def vjp(grad: Tensor) -> tuple[Tensor]:
            if dim is not None and not keepdim:
                grad = grad.unsqueeze(dim)
            return (grad.expand(a.shape),)

        return self._result(a.sum(dim, keepdim), vjp, self)

    def reshape(self, *shape: int) -> Var:
        """The same elements in another shape; one size may be -1."""
        a = self.data
        return self._result(a.reshape(shape), lambda grad: (grad.reshape(a.shape),), self)

    def backward(self) -> None:
        """Add the derivative of this single number to the `.grad` of every leaf that it depends on."""
        if self.data.numel() != 1:
            raise ValueError(f"backward starts at a single number, not at shape {tuple(self.data.shape)}")
        grads = {self: torch.ones_like(self.data)}
        for var in reversed(topo_order(self)):
            grad = grads.pop(var)
            if not var.parents:
                var.grad = grad.clone() if var.grad is None else var.grad + grad
                continue
            for parent, part in zip(var.parents, var._vjp(grad), strict=True):
                part = unbroadcast(part, parent.data.shape)
                grads[parent] = grads[parent] + part if parent in grads else part


class SiLUFunction(torch.autograd.Function):
    """`x * sigmoid(x)`, keeping only x: the sigmoid is cheaper to compute again than to store."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """Compute the value and keep x."""
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> Tensor | None:
        """Multiply by the derivative `s * (1 + x * (1 - s))`."""
        if not ctx.needs_input_grad[0]:
            return None
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad_output * s * (1 + x * (1 - s))


def silu(x: Tensor) -> Tensor:
    """`x * sigmoid(x)` (Hendrycks and Gimpel 2016), with the memory of its input alone."""
    return SiLUFunction.apply(x)


def saved_bytes(f: Callable, *args) -> int:
    """The bytes of the distinct storages that autograd saves for backward while `f(*args)` runs."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no other storage gets the same address
        return tensor.detach()  # an output that holds itself would be a cycle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        f(*args)
    return sum(storage.nbytes() for storage in storages.values())


def intermediate_grads(fns: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> list[Tensor]:
    """The gradient of the last function's value at the output of each function of the chain."""
    h = x.detach().requires_grad_()
    outputs = []
    for fn in fns:
        h = fn(h)
        outputs.append(h)
    if not outputs:
        return []
    if h.numel() != 1:
        raise ValueError(f"the chain must end in a single number, not in shape {tuple(h.shape)}")
    return list(torch.autograd.grad(h, outputs, materialize_grads=True))


class CheckpointFunction(torch.autograd.Function):
    """Run `f` without a graph, and a second time with one when the gradient arrives."""

    @staticmethod
    def forward(ctx, f: Callable[..., Tensor], *xs: Tensor) -> Tensor:
        """Compute the value; keep the inputs and the state of the random generators."""
        ctx.f = f
        ctx.rng_states = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        ctx.save_for_backward(*xs)
        return f(*xs)  # the gradient mode is off in here

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Run `f` again on fresh leaves, with the same random numbers, and differentiate that."""
        needs = ctx.needs_input_grad[1:]
        xs = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needs, strict=True)]
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.enable_grad():
            cpu_state, cuda_states = ctx.rng_states
            torch.set_rng_state(cpu_state)
            torch.cuda.set_rng_state_all(cuda_states)
            y = ctx.f(*xs)
        torch.autograd.backward(y, grad_output)
        return None, *(x.grad for x in xs)


def checkpoint(f: Callable[..., Tensor], *xs: Tensor) -> Tensor:
    """`f(*xs)`, keeping `xs` for backward instead of everything that `f` would save."""
    return CheckpointFunction.apply(f, *xs)
