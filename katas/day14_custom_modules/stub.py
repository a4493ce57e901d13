"""Day 14: layers with state. Two modes, buffers, precision, and numbers that come from somebody else's file.

Letters: `N` rows, `D`, `I`, `O` widths, `...` any number of leading dimensions, none and empty ones included.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from day08_linear_layers import Linear, LowRankLinear
from torch import Tensor, nn


class Embedding(nn.Module):
    """A table of `num` vectors of width `dim`: integers go in, rows come out.

    The only parameter is `weight` (num, dim), which starts with values from N(0, 1), drawn from torch's global
    random state; state dicts of nn.Embedding load into it. `num`, `dim` and `padding_idx` are kept as attributes.

    With a `padding_idx` that row starts as zeros. It is read like any other row, whatever it holds by then, but
    sends nothing back: its gradient through this layer is zero. Where the weight is used elsewhere too (a tied
    output head), the gradient from there still arrives at every row. A padding_idx outside of [0, num) raises
    ValueError with the number in the message.
    """

    def __init__(self, num: int, dim: int, padding_idx: int | None = None):
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        """Map integers (...) to vectors (..., dim) in the dtype of the weight.

        ids are int64 or int32. On the CPU an id below 0 or above num - 1 raises IndexError. On other devices
        the values of the ids are not looked at, since a program would have to wait for them, and on the meta device
        there are none; there nothing is promised about bad ids. Only the rows that were asked for are read: no
        matrix product, and no tensor that is larger than the result.
        """
        raise NotImplementedError


class Dropout(nn.Module):
    """In training each number becomes 0 with probability p, independently of all others; the rest grow by 1 / (1 - p).

    So the mean stays what it was, and in eval there is nothing to do. `p` and `generator` are kept as
    attributes; p outside of [0, 1] raises ValueError with p in the message. The state dict is empty.
    """

    def __init__(self, p: float, generator: torch.Generator | None = None):
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape and dtype of x, any shape; x itself does not change.

        In eval it is the very object x: no copy, no random number, no cost. In training every call draws anew,
        from `generator` if there is one (it may live on the CPU when x does not), and then the global random state
        is not touched; without one, from the global state of the device of x. Equal generators give equal results.

        p = 0 changes no value. p = 1 gives zeros with a gradient of zeros, never NaN. The gradient of what was
        dropped is 0, that of the rest 1 / (1 - p).
        """
        raise NotImplementedError


class RMSNorm(nn.Module):
    """x over the root of its mean square: x / sqrt(mean(x^2) + eps) * weight, the mean along the last dimension.

    The only parameter is `weight` (dim,), which starts as ones; state dicts of nn.RMSNorm load into it.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., dim) in the dtype of x, whatever the dtype of the weight.

        float16 and bfloat16 are normalized in float32, rounded to the dtype of x, and then multiplied by the weight
        in that dtype: bit by bit what DeepSeek does. Neither large nor small halves overflow or vanish on the way.
        float64 stays float64. A row of zeros gives zeros and finite gradients.

        In float32, at most 2 * x + weight + one number per row is saved for backward. If the last dimension of x
        is not that of the weight, ValueError with both shapes in the message.
        """
        raise NotImplementedError


class BatchNorm1d(nn.Module):
    """Columns with mean 0 and variance 1, then times `weight` (D,) plus `bias` (D,), which start as ones and zeros.

    The state dict is that of nn.BatchNorm1d, in its order: the two parameters and three buffers, `running_mean`
    (D,) of zeros, `running_var` (D,) of ones, and `num_batches_tracked`, an int64 scalar 0. Buffers are never
    part of a graph.
    """

    def __init__(self, D: int, eps: float = 1e-5, momentum: float = 0.1):
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, D) to (N, D) in the dtype of x: (x - mean) / sqrt(var + eps) * weight + bias.

        In training, mean and variance are those of the columns of x, the variance over N. Gradients flow through
        both. Then running_mean and running_var move by `momentum` of the way towards the mean and the *unbiased*
        variance (over N - 1), and num_batches_tracked grows by one. In eval mean and variance are the running ones,
        nothing changes, and N may be 1 or 0.

        Statistics of half inputs are taken in float32. A mean far larger than the spread does no harm. x that is
        not (N, D) raises ValueError with its shape and that of the weight; fewer than two rows in training raise
        ValueError with the shape of x. In both cases the state stays as it was.
        """
        raise NotImplementedError


class Report(NamedTuple):
    """What became of a checkpoint. Complete as it stands."""

    loaded: list[str]  # names of the module, in the order of the checkpoint
    missing: list[str]  # names of the module, in the order of its state dict
    unexpected: list[str]  # names of the checkpoint as they stand there, in its order
    mismatched: list[str]  # names of the module, in the order of the checkpoint


def load_renamed(
    module: nn.Module, tensors: dict[str, Tensor], rules: Sequence[tuple[str, str]], *, strict: bool = True
) -> Report:
    r"""Copy the tensors of a checkpoint into the parameters and buffers of a module; return what became of them.

    Each name of the checkpoint goes through all rules in order, each of which replaces every match of its regular
    expression, wherever it is in the name (`\1` stands for a group, as in re.sub). What comes out must be a name
    in the state dict of the module: parameters, frozen ones too, and those buffers that are saved. Then

    - unexpected: no such name in the module;
    - mismatched: the shapes differ, be it only by a dimension of 1;
    - loaded: the values were copied, cast to the dtype and device of their target;
    - missing: a name of the module that no tensor had. A tied parameter is one tensor with several names: as soon
      as one of them is given, none is missing. Several may be given if their values are equal in the dtype of
      the module.

    strict: anything missing, unexpected or mismatched raises ValueError, whose message has all these names and
    both shapes of each mismatch. strict=False loads the rest and reports. Whatever strict says, two names of the
    checkpoint that become one, and names of one tied parameter with different values, raise ValueError with the
    two names.

    Atomic: whenever an error is raised, nothing at all was copied. Parameters and buffers stay the objects that
    they were, without a graph; they share no memory with the checkpoint, and the dict does not change.
    """
    raise NotImplementedError


class LoRALinear(nn.Module):
    """A frozen linear layer plus a thin trained update: base(x) + alpha / rank * update(x).

    `base` (a Linear or an nn.Linear, with or without bias) is the very module that was given, and its parameters
    no longer ask for gradients. `update` is day 8's LowRankLinear without bias, on the device and in the dtype of
    the base: `update.down.weight` (rank, I) starts as that class starts it, `update.up.weight` (O, rank) as
    zeros, so at first nothing is added. These two are all that is trained. A rank below 1 raises ValueError with
    the rank in the message. `merged` says whether the update is in the weight of the base; at first it is not.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float):
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O) with 2 N I O + 2 N rank (I + O) FLOPs for N rows; 2 N I O where it is merged."""
        raise NotImplementedError

    def merge(self) -> None:
        """Add alpha / rank times the product of the update to the weight of the base, in place and without a graph.

        The layer computes the same afterwards, up to rounding. Where it is merged already, RuntimeError, and nothing
        changes.
        """
        raise NotImplementedError

    def unmerge(self) -> None:
        """Take the update out of the weight again, in place; RuntimeError, and no change, where it is not merged."""
        raise NotImplementedError


class QKVProjection(nn.Module):
    """Three linear layers D -> D, `q_proj`, `k_proj` and `v_proj`, with or without biases.

    In version 1 they were one layer `qkv`: a weight (3 D, D) and a bias (3 D,), whose rows were first those of q,
    then k, then v. load_state_dict still reads such files, at any depth inside other modules, from plain dicts
    too. Weight and bias are looked at each on their own, and the dict of the caller does not change. What is
    saved has the new names, and version 2 in the `_metadata` of the state dict.

    load_state_dict stays as strict as it is. An old file whose every tensor is used has nothing missing and nothing
    unexpected. Names that it lacks are reported missing, others unexpected, as usual. A fused tensor of the wrong
    shape raises RuntimeError, strict or not, with its old name, its shape and the one that was needed, and no part of
    it is loaded. If any of the three new names of a fused tensor is there as well, the new ones count and the fused
    one is unexpected.
    A fused bias where there are no biases is unexpected, under its old name.
    """

    def __init__(self, D: int, bias: bool = True):
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (..., D) to queries, keys and values, each (..., D)."""
        raise NotImplementedError
