"""Day 12: convolutional networks. A convolution is indexing, then one matrix product.

Letters: `B` images, `C` channels, `O` output channels, `H` and `W` height and width, `Ho` and `Wo` those of the output,
`L` = Ho * Wo places, `kh` and `kw` the kernel. Images are (B, C, H, W): channels come first.
A `Pair` is (height, width), or one int for both. Kernels, strides and dilations are at least 1, padding at least 0.
Wherever a kernel does not fit into the (padded) image, what you write raises the ValueError of `conv_output_size`.
"""

import torch
from day08_linear_layers import Linear, fan_in_fan_out  # noqa: F401 - yours, if you passed day 8
from torch import Tensor, nn

Pair = int | tuple[int, int]


def conv_output_size(n: int, k: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> int:
    """Return how many windows fit along an axis of n places, an int.

    padding: how many places are added at both ends
    dilation: the distance between two neighboring taps of the kernel of k taps; with 1 they touch
    The first window begins at the first place, each next one `stride` places later, and all of a window has to be
    inside: one that hangs over the end does not count.
    If not even one fits, ValueError with n and k in the message.
    """
    raise NotImplementedError


def pad2d(x: Tensor, p: int | tuple[int, int, int, int], value: float = 0.0) -> Tensor:
    """Return images x (B, C, H, W) in a frame of `value`: p places on all four sides, or (left, right, top, bottom).

    The result is (B, C, top + H + bottom, left + W + right), has the dtype of x (which may be an integer one), and
    memory of its own even where p is 0. B may be 0, strides do not matter, and gradients flow to x.
    A tuple of another length or a negative number raises ValueError with p in the message.
    """
    raise NotImplementedError


def im2col(x: Tensor, kernel: Pair, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1) -> Tensor:
    """Return all patches of x (B, C, H, W) as columns (B, C*kh*kw, L), as torch.nn.functional.unfold has them.

    The frame of `padding` holds zeros. Columns are in the order in which one reads: the places of the first row, then
    those of the second. In a column the kh*kw values of the first channel come first, row by row, then those
    of the second channel. Mind the order of the arguments: it is not the one of unfold.
    The dtype is that of x. B may be 0, gradients flow to x, and strides of x do not matter: it may be channels_last,
    a slice or expanded.
    Cost: with padding 0 no new memory but that of the result.
    """
    raise NotImplementedError


def conv2d(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Return what kernels w (O, C/groups, kh, kw) find in images x (B, C, H, W): (B, O, Ho, Wo), in the dtype of x.

    y[:, o, i, j] is b[o] plus the sum over channels c and taps (u, v) of w[o, c, u, v] times the place of the
    padded x at row i * stride + u * dilation and column j * stride + v * dilation. Nothing is flipped.
    Outputs are in `groups` blocks of O/groups, and channels in as many blocks of C/groups: a block of outputs sees
    its own block of channels and nothing else. groups = C is a depthwise convolution.
    b: (O,). B may be 0, strides of tensors do not matter, and gradients flow to all three.

    ValueError with the shapes of x and w if C is not w.shape[1] * groups or groups does not divide O; with those of b
    and w if b is not (O,).
    Cost: all products are matrix products, of exactly 2 * B * O * Ho * Wo * (C/groups) * kh * kw FLOPs. Only where a group
    has a single channel may they be elementwise ones, which are not counted.
    """
    raise NotImplementedError


def max_pool2d(x: Tensor, k: Pair, stride: Pair | None = None, padding: Pair = 0) -> Tensor:
    """Return the largest value of each window of x (B, C, H, W): (B, C, Ho, Wo), in the (floating) dtype of x.

    stride: None means that of k: windows lie side by side
    padding: places around the image that never win, however small the values inside are
    B may be 0, strides of x do not matter. Gradients flow to x, from each window to one place: where several
    are equally large, one of them gets all of it.
    Padding of more than half the window (on its axis) raises ValueError with padding and k in the message.
    """
    raise NotImplementedError


def avg_pool2d(
    x: Tensor, k: Pair, stride: Pair | None = None, padding: Pair = 0, count_include_pad: bool = True
) -> Tensor:
    """Return the mean of each window of x (B, C, H, W): (B, C, Ho, Wo), in the (floating) dtype of x.

    Padded places add 0 to the sum. With count_include_pad each sum is divided by kh * kw; without, by the number of
    places of the window that are inside the image. All else is as in `max_pool2d`.
    """
    raise NotImplementedError


def receptive_field(layers: list[tuple[int, int, int]]) -> tuple[int, int]:
    """Return (size, jump), two ints, for layers (kernel, stride, dilation) one after the other, along one axis.

    size: from the first to the last place of the input that one output depends on, both counted (far from borders)
    jump: how many places of the input lie between where two neighboring outputs begin; 1 says that they touch
    Without layers both are 1.
    """
    raise NotImplementedError


class Conv2d(nn.Module):
    """A layer with parameters `weight` (O, C/groups, kh, kw) and `bias` (O,), for what `conv2d` does with them.

    State dicts of nn.Conv2d load into it and the other way round; with bias=False, `bias` is None and not in the state
    dict. Both parameters are created on `device` ("meta" included) in `dtype`, with values from
    U(-1/sqrt(fan_in), 1/sqrt(fan_in)) from torch's global random state, with day 8's fan_in of the weight.
    If groups does not divide in_channels and out_channels, ValueError with both numbers in the message.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        device=None,
        dtype=None,
    ):
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, O, Ho, Wo); x is not changed."""
        raise NotImplementedError


def bar_images(n: int, size: int, *, noise: float = 0.3, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw n noisy images (n, 1, size, size) with a bar of five places each; labels (n,) say which way it lies.

    0 is a row, 1 a column, 2 falls to the right, 3 falls to the left. size is at least 7; all is made on the CPU.
    This one is here to be used: there is nothing to write.
    """
    labels = torch.randint(0, 4, (n,), generator=generator)
    centers = torch.randint(3, size - 3, (n, 1, 2), generator=generator)
    directions = torch.tensor([[0, 1], [1, 0], [1, 1], [1, -1]])
    places = centers + torch.arange(-2, 3)[:, None] * directions[labels][:, None]  # (n, 5, 2)
    images = noise * torch.randn(n, 1, size, size, generator=generator)
    images[torch.arange(n)[:, None], 0, places[..., 0], places[..., 1]] += 1.0
    return images, labels


class SmallCNN(nn.Module):
    """A network that tells which way a bar lies, wherever it is and however large the image.

    conv1: `Conv2d` from 1 to 8 channels, a kernel of 3 and padding 1, then ReLU and max pooling of 2
    conv2: `Conv2d` from 8 to 16 channels, a kernel of 3 and padding 1, then ReLU
    then the largest value of each channel over all places, and `head`, day 8's Linear(16, n_classes)

    The state dict holds the weight and bias of conv1, conv2 and head. After 100 steps of Adam with a learning rate of 0.01
    on batches of 64 `bar_images` of size 12, at least 95 % of fresh images are told right, of size 12 and of size 20.
    """

    def __init__(self, n_classes: int):
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 1, H, W), of any size from 2 x 2 on, to logits (B, n_classes); x is not changed."""
        raise NotImplementedError


def conv_transpose2d(
    y: Tensor,
    w: Tensor,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    output_padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Return the adjoint of A: x -> conv2d(x, w, stride, padding, dilation, groups), applied to y (B, O, Ho, Wo).

    A is linear in x, and its adjoint is the one linear map A^T with <A x, y> = <x, A^T y> for all x and y, where <,> is
    the sum of all products. w is (O, C/groups, kh, kw), as in `conv2d`; the result is (B, C, H, W), in the dtype of y.
    H is the smallest for which the convolution gives Ho, plus output_padding (it drops what does not fit, so several
    H give the same Ho); W likewise. B may be 0, strides do not matter, and gradients flow to y and w.

    ValueError with the shapes of y and w if they differ in O, or groups does not divide it; with output_padding and
    stride if the first is not smaller than the second (on an axis); and if H or W were below 1.
    """
    raise NotImplementedError
