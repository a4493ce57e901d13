"""Day 05: modules. What is registered is found, moved, saved and trained; what is not is forgotten."""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter


def count_parameters(module: nn.Module, trainable_only: bool = False) -> int:
    """How many numbers the parameters of `module` and of everything inside it hold, as a Python int.

    A parameter that is shared (one weight under two names, one layer in two places) counts once. Buffers
    never count. `trainable_only` leaves out the parameters that are frozen (`requires_grad` is False). A
    module without parameters has 0. Nothing is allocated, and a module on the meta device, which has shapes
    and no numbers, is counted like any other.
    """
    raise NotImplementedError


def trainable_groups(module: nn.Module) -> list[Parameter]:
    """The parameters that an optimizer should get, as a list.

    The module's own Parameter objects (no copies) with `requires_grad`, from all its depths, each exactly
    once even where it is tied, in the order in which `module` lists its parameters.
    """
    raise NotImplementedError


class MLP(nn.Module):
    """Linear layers with an activation between them: (..., sizes[0]) -> (..., sizes[-1]).

    `sizes` are the widths from input to output: [3, 8, 2] makes two layers, 3 to 8 and 8 to 2, each with its
    own weight (out, in) and bias. The state_dict has exactly the keys `layers.0.weight`, `layers.0.bias`,
    `layers.1.weight`, ... in this order. `activation` is called once between each two layers and never after
    the last, so that two sizes make a plain linear map.

    Any leading axes are kept. The layers are called like functions, so that hooks on them run. On an input
    (N, D) the forward costs exactly one matrix product per layer. A deep copy has parameters of its own and
    computes with them. x is not changed. Fewer than two sizes raise ValueError with the list in its message.
    An x whose last axis is not sizes[0] raises ValueError with both shapes, written as tuples: `(2, 5)` and
    `(..., 3)`.
    """

    def __init__(self, sizes: list[int], activation: Callable[[Tensor], Tensor] = torch.relu):
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., sizes[0]) to (..., sizes[-1])."""
        raise NotImplementedError


class Standardizer(nn.Module):
    """Subtract a stored mean and divide by a stored standard deviation, column by column.

    The two are buffers `mean` and `std` of shape (D,), D = n_features, at first zeros and ones. They are the
    only keys of the state_dict, and a fresh Standardizer that loads it gives the same outputs. They follow
    `.to(torch.float64)`. There are no parameters. Only `fit` changes the buffers, in either mode (train,
    eval).
    """

    def __init__(self, n_features: int):
        raise NotImplementedError

    def fit(self, x: Tensor) -> "Standardizer":
        """Measure the columns of x (N, D), store what was found, and return the module itself.

        `mean` is the mean over the N rows, `std` the population standard deviation (division by N). A column
        whose N numbers are all equal, whatever the number, gets std 1; so does every column when N is 1.

        The arithmetic is in the wider of the dtypes of x and of the buffers (bfloat16 data are measured in
        float32), and stays accurate when a mean is 10,000 times as large as the spread around it. The results
        are written into the existing buffers: whoever holds one of them sees the new numbers, its dtype does
        not change, and nothing of an earlier fit remains. No graph is recorded, also when x requires a
        gradient. x is not changed. An x that is not (N, D) with N of at least 1 raises ValueError with both
        shapes, written as tuples: `(2, 5)` and `(N, 3)`.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Standardize the last axis of x (..., D) with the stored buffers; gradients reach x.

        Computed in the wider of the dtypes of x and of the buffers, returned in the dtype of x. x is not
        changed. A last axis other than D raises ValueError with both shapes, written as tuples: `(2, 5)` and
        `(..., 3)`.
        """
        raise NotImplementedError


class Residual(nn.Module):
    """x + scale * inner(x), with one learnable number `scale`.

    `inner` is kept as it is (not copied) under the name `inner`. `scale` is a parameter of shape () in the
    default float dtype, also when an int is given; `.to(dtype)` moves it with the rest. The state_dict has
    the keys `scale` and `inner.*`.
    """

    def __init__(self, inner: nn.Module, scale: float = 1.0):
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Add scale * inner(x) to x; the result has the shape and dtype of x.

        Gradients reach x, `scale` (even where it is 0) and the parameters of `inner`. `inner` is called like
        a function, so that its hooks run. An `inner` that returns another shape than that of x raises
        ValueError with both shapes, written as tuples. x is not changed.
        """
        raise NotImplementedError


def freeze(module: nn.Module, pattern: str) -> list[str]:
    """Switch off `requires_grad` of the parameters whose name contains a match of the regular expression.

    Names are the dotted ones of `named_parameters`, and the match may lie anywhere in them; case counts. A
    tied parameter is frozen if any of its names matches. Returns the names of the parameters that this call
    has frozen, in the module's order: those that were frozen before are not among them, and a tied parameter
    appears once, under the first of its names that matches.

    The `.grad` of what is frozen becomes None, or an optimizer would go on following it. All other parameters
    keep their `requires_grad`, their `.grad` and the gradients that they will get. No value changes, nor does
    the train or eval mode.
    """
    raise NotImplementedError


class Row(NamedTuple):
    """One call of one module. Complete as it stands."""

    name: str
    type: str
    output_shape: tuple | None
    params: int


def summarize(module: nn.Module, *inputs) -> list[Row]:
    """Call `module(*inputs)` once; return one Row per call of a module, in the order in which calls finish.

    Children therefore come before their parent and the module itself comes last, with the name "". A module
    that is called twice has two rows, one that is not called has none; one that is registered under two names
    goes by the first. `type` is the name of its class, `params` what count_parameters says about it (with all
    that is inside it). `output_shape` is the output's shape as a tuple; for a tuple or list of outputs it is
    the tuple of their shapes; for anything that is not a tensor it is None.

    The module is called like a function, so that its own hooks run, in the mode it is in and without
    recording a graph. Afterwards, also when the forward raises (the exception is passed on), the hooks are
    those from before and gradients are recorded as before. No output is kept alive, not even until the
    forward ends.
    """
    raise NotImplementedError


def functional_apply(module: nn.Module, tensors: dict[str, Tensor], *args):
    """Return `module(*args)` computed with the given tensors in place of its own parameters and buffers.

    `tensors` maps dotted names to tensors (plain ones or Parameters); what it does not name stays the
    module's own. A tensor given for one name of a tied parameter or buffer stands in under all of its names.
    Gradients flow to the given tensors, also under torch.func.vmap. The module is called like a function, so
    that hooks run, and no parameter or buffer is copied.

    Afterwards, also when the forward raises, the module holds the very same parameters and buffers under the
    same names in the same order, with their values, `.grad` and persistence; a buffer that the forward
    replaces while a stand-in is in its place is put back.

    A name that the module does not have raises KeyError, a stand-in of another shape raises ValueError with
    both shapes written as tuples, and two different tensors for one tied parameter raise ValueError. The
    message has the name (of a tied parameter, any of its names), and the forward does not run.
    """
    raise NotImplementedError


def per_sample_grads(
    module: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """Gradients of `loss_fn(module(x[i:i+1]), y[i:i+1])` for every sample i, stacked.

    x (N, ...) and y (N, ...) with N of at least 1, a module with something to train; `loss_fn` returns a
    scalar. The result maps the name of every trainable parameter (a tied one under its first name), in the
    module's order, to a tensor (N, *shape of the parameter). The module is called once, not N times, and
    neither its `.grad` fields nor anything else in it changes. Different N raise ValueError with both shapes
    written as tuples.
    """
    raise NotImplementedError
