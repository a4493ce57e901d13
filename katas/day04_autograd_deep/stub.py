"""Day 4: build the graph, then bend it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def matmul_vjp(a: Tensor, b: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients at `a` and `b`, given the gradient at their product.

    `a` is (N, K), `b` is (K, M), and `grad` (N, M) holds the derivative of some final number by each element
    of `a @ b`. Returns the derivatives of that number by `a` (N, K) and by `b` (K, M), in the inputs' dtype.
    Any of the sizes may be 0.

    Costs two matrix products; no tensor with more elements than the largest of `a`, `b` and `grad` is made.
    Autograd is not used.

    ValueError with both shapes if `a` and `b` are not matrices that can be multiplied, and, with the shape of
    the product and the shape of `grad`, if these differ.
    """
    raise NotImplementedError


def unbroadcast(grad: Tensor, shape: Sequence[int]) -> Tensor:
    """The gradient at an operand of shape `shape` that was broadcast to the shape of `grad`.

    Broadcasting copied each element of the operand to several places; the derivative by that element is the
    sum of `grad` over these places. The result has exactly the shape `shape` (a tuple, list or torch.Size)
    and the dtype of `grad`. Sizes of 0 and the shape `()` are shapes like all others.

    If nothing was broadcast, no memory is allocated: `grad` itself (or a view of it) comes back.
    Autograd and Tensor.sum_to_size are not used.

    ValueError with both shapes if `shape` does not broadcast to the shape of `grad`.
    """
    raise NotImplementedError


@dataclass(eq=False)
class Node:
    """Given: a value in a graph; `parents` are the nodes that it was computed from."""

    name: str
    parents: tuple[Node, ...] = ()


def topo_order(root: Node) -> list[Node]:
    """A list of all nodes that `root` depends on, directly or not, and `root` itself.

    Each node is there once, and after all of its parents, so that `root` is last. Any such order will do.
    A node may be a parent of many others, or the same parent twice. The graph has no cycles.
    `root` is anything that has `.parents` all the way down and can be put into a set, so that it works for
    `Var`, too.

    The length of the longest path does not matter (50,000 nodes in a row are fine, and the call stack does
    not grow with them). V nodes with E parents in all are handled in O(V + E) steps: `.parents` is read at
    most 4 * (V + E) times, and no node is searched for in a list. The nodes are left as they were.
    """
    raise NotImplementedError


class Var:
    """A tensor that remembers how it was computed, so that `backward` can differentiate it.

    `Var(data)` is a leaf made of a plain floating-point tensor; operations on Vars give Vars.
    `.data` is the value and `.grad` the gradient, both plain tensors; `.grad` is None until a backward pass
    reached the Var. What `.grad` holds on a Var that is not a leaf is up to you.

    - `+`, `-`, `*`, `/` of two Vars with broadcasting, or of a Var and a Python number on either side; `-v`;
    - `@` of two Vars with at least two dimensions, (..., N, K) @ (..., K, M), leading dimensions broadcast;
    - `v ** n` for a Python int n, which may be negative or 0 (the derivative of `v ** 0` is 0 everywhere);
    - `exp`, `log`, `relu` (whose derivative at 0 is 0), `sum`, `reshape`.

    Values and gradients have the dtype of the data, float64 to full precision, also next to Python numbers.
    Torch's autograd is not used: no tensor in here requires grad. No operation changes its operands.

    ValueError with both shapes if the operands of `+`, `-`, `*`, `/` do not broadcast, or those of `@` do not
    fit (one-dimensional operands never do).
    """

    def __init__(self, data: Tensor) -> None:
        raise NotImplementedError

    def __add__(self, other: Var | float) -> Var:
        raise NotImplementedError

    def __radd__(self, other: float) -> Var:
        raise NotImplementedError

    def __sub__(self, other: Var | float) -> Var:
        raise NotImplementedError

    def __rsub__(self, other: float) -> Var:
        raise NotImplementedError

    def __mul__(self, other: Var | float) -> Var:
        raise NotImplementedError

    def __rmul__(self, other: float) -> Var:
        raise NotImplementedError

    def __truediv__(self, other: Var | float) -> Var:
        raise NotImplementedError

    def __rtruediv__(self, other: float) -> Var:
        raise NotImplementedError

    def __neg__(self) -> Var:
        raise NotImplementedError

    def __pow__(self, exponent: int) -> Var:
        raise NotImplementedError

    def __matmul__(self, other: Var) -> Var:
        raise NotImplementedError

    def exp(self) -> Var:
        """The exponential of each element."""
        raise NotImplementedError

    def log(self) -> Var:
        """The natural logarithm of each element."""
        raise NotImplementedError

    def relu(self) -> Var:
        """Each element, or zero where it is negative."""
        raise NotImplementedError

    def sum(self, dim: int | None = None, keepdim: bool = False) -> Var:
        """The sum over one dimension (may be negative), or over all; `keepdim` leaves sizes of 1 behind."""
        raise NotImplementedError

    def reshape(self, *shape: int) -> Var:
        """The same elements in another shape; one size may be -1."""
        raise NotImplementedError

    def backward(self) -> None:
        """Add the derivatives of this Var, by each leaf that it depends on, to the leaves' `.grad`.

        This Var holds exactly one number, in any number of dimensions; ValueError with its shape if not.
        A leaf's `.grad` has the shape of its data and its own memory: zeroing one in place changes nothing
        else. A second call, on the same Var or on another, adds to what is there. Leaves that this Var does
        not depend on keep the `.grad` that they have.

        Each operation's rule runs once, however many paths lead through it, and graphs may be thousands of
        operations deep.
        """
        raise NotImplementedError


class SiLUFunction(torch.autograd.Function):
    """`x * sigmoid(x)` for autograd, with a backward pass of your own.

    `SiLUFunction.apply(x)` takes a floating-point tensor of any shape and strides; the result has shape and
    dtype of `x`. Value and gradient are right for huge inputs, too (1e4 and -1e4).

    It keeps exactly one tensor for backward, `x`, and it does so where autograd can see it: if `x` is changed
    in place before the backward pass, that pass raises RuntimeError. `backward` returns None if
    `ctx.needs_input_grad` says that nobody wants the gradient; it takes gradients with any strides, leaves
    them unchanged, and can be differentiated again.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """Compute the value."""
        raise NotImplementedError

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> Tensor | None:
        """Compute the gradient at `x` from the gradient at the value."""
        raise NotImplementedError


def silu(x: Tensor) -> Tensor:
    """`x * sigmoid(x)` by `SiLUFunction`, with all that it promises.

    Saves as many bytes for backward as `x` has. torch's own silu is not used.
    """
    raise NotImplementedError


def saved_bytes(f: Callable, *args) -> int:
    """How many bytes autograd saves for backward while `f(*args)` runs, as an int.

    `f` is called once. What counts is the memory that cannot be freed: the whole storage of each saved tensor
    (also if only a part of it is seen through a slice, or if it is seen larger through an expand), and each
    storage once, however often and in whatever views it is saved. Saved inputs and parameters count like
    everything else. Where autograd does not record (no_grad, or nothing requires grad), the answer is 0.

    `f` may run backward passes itself. Its result is thrown away, and nothing that it made is alive when the
    call returns, even with the garbage collector switched off.
    """
    raise NotImplementedError


def intermediate_grads(fns: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> list[Tensor]:
    """The gradients in the middle of a chain of functions.

    With `h1 = fns[0](x)`, `h2 = fns[1](h1)` and so on, the last value is a single number (in a tensor of any
    number of dimensions). Entry i of the result is the derivative of that number by the output of `fns[i]`,
    with the shape and dtype of that output; so the last entry is 1. Where the functions that follow ignore
    an output, its gradient is zeros. No functions give an empty list.

    Each function is called once and returns a tensor that requires grad. A function may return the very
    tensor that it got, and one function may be in the list several times. `x` need not require grad, and may
    itself be the result of a computation.

    Afterwards everything is as before: no `.grad` has changed, neither that of `x` nor that of parameters
    that the functions use, and no hook is left on the outputs.

    ValueError with the last value's shape if it is not a single number.
    """
    raise NotImplementedError


def checkpoint(f: Callable[..., Tensor], *xs: Tensor) -> Tensor:
    """`f(*xs)`, but what `f` saves for backward is not kept: the backward pass runs `f` a second time.

    `f` returns one tensor. Values and gradients are those of `f(*xs)`. Gradients also reach the parameters
    that `f` uses without getting them as arguments, as long as one of `xs` requires grad and the pass is
    started with `.backward()`. Some of `xs` may not require grad, or hold integers.

    Between forward and backward autograd keeps `xs` and nothing else, except for up to 16 kB for the state of
    the random generators; changing one of `xs` in place makes the backward pass raise RuntimeError. `f` runs
    once in the forward pass and once more per backward pass, and under no_grad only once.

    Random operations in `f` (from torch's default generators) draw the same numbers both times, and the
    backward pass leaves the state of these generators as it found it.

    Only the gradients that were asked for change: torch.autograd.grad by `xs` leaves their `.grad` alone.
    `f` may call `checkpoint` itself. Second derivatives are not supported.

    torch.utils.checkpoint is not used.
    """
    raise NotImplementedError
