"""Day 08: linear layers. One matrix product, its three gradients, and the variance that decides whether depth works.

Letters: `I` and `O` are the widths in and out, `...` any number of leading dimensions, none and empty ones included.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from day05_nn_module_basics import Residual
from torch import Tensor, nn


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Return x W^T + b for x (..., I), w (O, I) and, if there is one, b (O,); a tensor (..., O) in the dtype of x.

    All rows of x go through exactly one matrix product, of 2 * N * I * O FLOPs for N rows. w need not be
    contiguous, and I, O and N may be 0. Gradients flow to all three inputs.

    If w does not fit the last dimension of x, or b does not fit w, ValueError with both shapes in the message.
    """
    raise NotImplementedError


def linear_backward(dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients (dx, dw, db) of `linear` by hand, given the gradient dy (..., O) at its result.

    dx has the shape of x (..., I), dw that of w (O, I), and db has shape (O,); sums run over all leading
    dimensions, of which there may be none. Everything keeps the dtype of the inputs, and none of the inputs
    need be contiguous. Two matrix products, of 2 * N * I * O FLOPs each; autograd is not used.

    If x does not fit w, or dy does not fit x and w, ValueError with the shapes that clash in the message.
    """
    raise NotImplementedError


class Linear(nn.Module):
    """The layer x W^T + b, with parameters `weight` (O, I) and `bias` (O,) as in nn.Linear.

    State dicts of nn.Linear load into it and the other way round; without a bias `bias` is None and is not in
    the state dict. `in_features` and `out_features` are kept as attributes. Both parameters are created on
    `device` in `dtype`, and start with values from U(-1/sqrt(I), 1/sqrt(I)), drawn from torch's global random
    state (as nn.Linear does). With in_features = 0 nothing is divided by zero, and the bias is zeros.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, device=None, dtype=None):
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O), with one matrix product; ValueError with both shapes if x does not fit."""
        raise NotImplementedError


def fan_in_fan_out(shape: Sequence[int]) -> tuple[int, int]:
    """How many numbers one output is summed from, and how many outputs one input goes into: (fan_in, fan_out).

    `shape` (a tuple, a list or a torch.Size) is that of a linear weight (O, I) or of a convolution's
    (O, I, *kernel) with any number of kernel dimensions. Returns two ints. Fewer than two dimensions raise
    ValueError with the shape in the message.
    """
    raise NotImplementedError


def xavier_uniform_(w: Tensor, gain: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Fill w in place from a uniform distribution around 0 with variance gain^2 * 2 / (fan_in + fan_out).

    w is a weight of a linear layer or a convolution. Returns w itself. The numbers come from `generator`, and
    then the global random state is not touched. No graph is recorded, also where w asks for gradients; but
    autograd knows of the write: a backward pass that needs the values from before raises.
    """
    raise NotImplementedError


def kaiming_normal_(
    w: Tensor, nonlinearity: str = "relu", mode: str = "fan_in", generator: torch.Generator | None = None
) -> Tensor:
    """Fill w in place from a normal distribution around 0 with variance gain^2 / fan.

    The gain belongs to `nonlinearity`: 1 for "linear", sqrt(2) for "relu", 5/3 for "tanh". The fan is the
    one that `mode` names, "fan_in" or "fan_out". Other words raise ValueError with the word in the message,
    and w stays as it was. All else is as in `xavier_uniform_`.
    """
    raise NotImplementedError


def forward_variance(
    depth: int, width: int, init_: Callable[..., object], act: Callable[[Tensor], Tensor], *, seed: int
) -> Tensor:
    """Send random inputs through `depth` layers; return the mean square of what leaves each, shape (depth,).

    The inputs are 256 rows of `width` numbers from N(0, 1). A layer is x -> act(x W^T) with a weight
    (width, width) of its own, that `init_(w, generator=generator)` fills in place. Entry l of the result is
    the mean of the squares, the second moment about zero, of all that comes out of layer l, `act` included.

    Everything is float32 on the CPU. Inputs and weights are drawn from one generator with the seed `seed`:
    equal seeds give equal results, and the global random state is not touched. No graph is recorded.
    """
    raise NotImplementedError


def trunc_normal_(w: Tensor, std: float, bound: float = 2.0, generator: torch.Generator | None = None) -> Tensor:
    """Fill w in place from N(0, std^2) truncated at `bound` standard deviations, on both sides.

    That is the normal distribution given that nothing lies outside of [-bound * std, bound * std]: inside, its
    shape is the bell, and nothing piles up at the edges. `std` is that of the normal before it is cut, so what
    comes out has a smaller one. w is float32 or float64, of any shape. All else is as in `xavier_uniform_`.
    """
    raise NotImplementedError


class LowRankLinear(nn.Module):
    """A linear layer whose weight is a product of two thin ones: `up.weight` (O, rank) times `down.weight` (rank, I).

    `down` and `up` are linear layers that start like `Linear`; `down` has no bias, and `up` has one if `bias`.
    `rank` is kept as an attribute; below 1 it raises ValueError with the rank in the message.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True, *, device=None, dtype=None):
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O) with 2 * N * rank * (I + O) FLOPs for N rows."""
        raise NotImplementedError


def low_rank_from(linear: nn.Module, rank: int) -> LowRankLinear:
    """The LowRankLinear of this rank whose weight is nearest to that of a linear layer.

    No product of that rank has a smaller sum of squared differences. The layer is a `Linear` or an nn.Linear;
    its bias is kept, or its lack of one, and so are dtype and device. A rank above min(I, O) is taken as
    min(I, O), where nothing is lost; below 1 it raises ValueError.

    The parameters of the result are its own (leaves, trainable), with no memory and no graph in common with
    the layer, which does not change.
    """
    raise NotImplementedError


def init_residual_(blocks: Iterable[Residual], depth: int, generator: torch.Generator | None = None) -> None:
    """Initialize blocks of a deep residual network so that neither signal nor gradient depends on the depth.

    Each block is day 5's `Residual(MLP([D, ..., D]))` with relu, so x + scale * inner(x), and it stands in a
    network of `depth` such blocks, of which `blocks` may be a part. For inputs from N(0, 1):

    - the mean square after `depth` blocks is within 10 % of that of the input;
    - the blocks do something: the mean square of what they add together is at least 1 % of that of the input;
    - no weight of any `inner.layers` has a gradient of zeros, and from the first block to the last the norms
      of the gradients of corresponding weights differ by less than a factor of 2.

    What weights, biases and `scale` held before has no influence, and biases start at 0. Parameters are filled
    in place, without a graph, from `generator`, and then the global random state is not touched.
    """
    raise NotImplementedError
