"""Day 12: convolutional networks. A convolution is indexing, then one matrix product.

Patches are laid out as columns (im2col, Chellapilla et al. 2006), the kernel as rows. Sizes follow Dumoulin and Visin
2016, A guide to convolution arithmetic for deep learning (arXiv:1603.07285), receptive fields Araujo et al. 2019.
What is called convolution here is cross-correlation, as in all of deep learning: the kernel is not flipped.

Letters: `B` images, `C` channels, `O` output channels, `H` and `W` height and width, `Ho` and `Wo` those of the output,
`L` = Ho * Wo places, `kh` and `kw` the kernel. Sizes are (height, width), or one number for both.
"""

import torch
from torch import Tensor, nn

from reference.day08_linear_layers import Linear, fan_in_fan_out

Pair = int | tuple[int, int]


def conv_output_size(n: int, k: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> int:
    """How many windows fit along an axis of n places."""
    span = dilation * (k - 1) + 1
    size = (n + 2 * padding - span) // stride + 1
    if size < 1:
        raise ValueError(
            f"a kernel of {k} (dilation {dilation}) spans {span}: too much for {n} places with padding {padding}"
        )
    return size


def pad2d(x: Tensor, p: int | tuple[int, int, int, int], value: float = 0.0) -> Tensor:
    """Put `value` around images (B, C, H, W): p places on each side, or (left, right, top, bottom)."""
    sides = (p,) * 4 if isinstance(p, int) else p
    if len(sides) != 4 or min(sides) < 0:
        raise ValueError(f"p is one number or (left, right, top, bottom), none below 0, not {p}")
    left, right, top, bottom = sides
    B, C, H, W = x.shape
    padded = x.new_full((B, C, top + H + bottom, left + W + right), value)
    padded[:, :, top : top + H, left : left + W] = x
    return padded


def im2col(x: Tensor, kernel: Pair, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1) -> Tensor:
    """Lay the patches of x (B, C, H, W) side by side as columns (B, C*kh*kw, L)."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = map(_pair, (kernel, stride, padding, dilation))
    if (ph, pw) != (0, 0):
        x = pad2d(x, (pw, pw, ph, ph))
    B, C, H, W = x.shape
    Ho, Wo = conv_output_size(H, kh, sh, dilation=dh), conv_output_size(W, kw, sw, dilation=dw)
    to_image, to_channel, down, right = x.stride()
    strides = to_image, to_channel, dh * down, dw * right, sh * down, sw * right
    patches = x.as_strided((B, C, kh, kw, Ho, Wo), strides)  # a view: each place of x is in many patches
    return patches.reshape(B, C * kh * kw, Ho * Wo)  # (B, C*kh*kw, L), the only copy


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
    """Slide kernels w (O, C/groups, kh, kw) over images x (B, C, H, W): (B, O, Ho, Wo)."""
    B, C, H, W = x.shape
    O, Cg, kh, kw = w.shape  # noqa: E741
    if C != Cg * groups or O % groups:
        raise ValueError(f"w {tuple(w.shape)} does not fit x {tuple(x.shape)} in {groups} groups")
    if b is not None and b.shape != (O,):
        raise ValueError(f"b {tuple(b.shape)} does not fit w {tuple(w.shape)}")
    (sh, sw), (ph, pw), (dh, dw) = map(_pair, (stride, padding, dilation))
    Ho, Wo = conv_output_size(H, kh, sh, ph, dh), conv_output_size(W, kw, sw, pw, dw)
    columns = im2col(x, (kh, kw), stride, padding, dilation)  # (B, C*kh*kw, L)
    columns = columns.reshape(B, groups, Cg * kh * kw, Ho * Wo)
    rows = w.reshape(groups, O // groups, Cg * kh * kw)
    y = (rows @ columns).reshape(B, O, Ho, Wo)
    return y if b is None else y + b[:, None, None]


def max_pool2d(x: Tensor, k: Pair, stride: Pair | None = None, padding: Pair = 0) -> Tensor:
    """The largest value of each window of x (B, C, H, W); padding never wins."""
    return _windows(x, k, stride, padding, float("-inf")).max(dim=2).values  # (B, C, Ho, Wo)


def avg_pool2d(
    x: Tensor, k: Pair, stride: Pair | None = None, padding: Pair = 0, count_include_pad: bool = True
) -> Tensor:
    """The mean of each window of x (B, C, H, W), over all its places or over those inside the image."""
    windows = _windows(x, k, stride, padding, 0.0)  # (B, C, kh*kw, Ho, Wo)
    if count_include_pad:
        return windows.mean(dim=2)
    inside = _windows(x.new_ones(1, 1, *x.shape[2:]), k, stride, padding, 0.0)
    return windows.sum(dim=2) / inside.sum(dim=2)


def receptive_field(layers: list[tuple[int, int, int]]) -> tuple[int, int]:
    """How many input places one output sees, and how far apart in the input two neighbors are, for (k, s, d) each."""
    size = jump = 1
    for k, s, d in layers:
        size += (k - 1) * d * jump
        jump *= s
    return size, jump


class Conv2d(nn.Module):
    """A layer with weight (O, C/groups, kh, kw) and bias (O,), both U(-1/sqrt(fan_in), 1/sqrt(fan_in)) at first."""

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
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"{groups} groups divide {in_channels} in_channels or {out_channels} out_channels unevenly"
            )
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        shape = (out_channels, in_channels // groups, *_pair(kernel_size))
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        fan_in, _ = fan_in_fan_out(shape)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, O, Ho, Wo)."""
        options = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        return conv2d(x, self.weight, self.bias, **options)


class SmallCNN(nn.Module):
    """Two convolutions, the strongest answer of each channel wherever it is, and one linear layer."""

    def __init__(self, n_classes: int):
        super().__init__()
        self.conv1 = Conv2d(1, 8, 3, padding=1)
        self.conv2 = Conv2d(8, 16, 3, padding=1)
        self.head = Linear(16, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 1, H, W) of any size to logits (B, n_classes)."""
        x = max_pool2d(torch.relu(self.conv1(x)), 2)  # (B, 8, H/2, W/2)
        x = torch.relu(self.conv2(x))  # (B, 16, H/2, W/2)
        return self.head(x.amax(dim=(2, 3)))


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
    """The adjoint of x -> conv2d(x, w): map y (B, O, Ho, Wo) back to (B, C, H, W), as columns, added where they lay."""
    B, O, Ho, Wo = y.shape  # noqa: E741
    Cg, kh, kw = w.shape[1:]
    if O != w.shape[0] or O % groups:
        raise ValueError(f"w {tuple(w.shape)} does not fit y {tuple(y.shape)} in {groups} groups")
    (sh, sw), (ph, pw), (oh, ow), (dh, dw) = map(_pair, (stride, padding, output_padding, dilation))
    if oh >= sh or ow >= sw:
        raise ValueError(f"output_padding {output_padding} must be smaller than stride {stride}")
    reach_h, reach_w = (Ho - 1) * sh + 1, (Wo - 1) * sw + 1  # from the first to the last place of one kernel tap
    H, W = reach_h + dh * (kh - 1) + oh, reach_w + dw * (kw - 1) + ow  # padding included
    if H <= 2 * ph or W <= 2 * pw:
        raise ValueError(f"padding {padding} leaves nothing of {(H, W)}")
    rows = w.reshape(groups, O // groups, Cg * kh * kw)
    columns = rows.mT @ y.reshape(B, groups, O // groups, Ho * Wo)  # (B, groups, C/groups*kh*kw, L)
    columns = columns.reshape(B, groups * Cg, kh, kw, Ho, Wo)
    x = y.new_zeros(B, groups * Cg, H, W)
    for i in range(kh):
        for j in range(kw):
            top, left = i * dh, j * dw
            x[:, :, top : top + reach_h : sh, left : left + reach_w : sw] += columns[:, :, i, j]
    return x[:, :, ph : H - ph, pw : W - pw]


def _pair(size: Pair) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _windows(x: Tensor, k: Pair, stride: Pair | None, padding: Pair, value: float) -> Tensor:
    (kh, kw), (ph, pw) = _pair(k), _pair(padding)
    sh, sw = _pair(k if stride is None else stride)
    if 2 * ph > kh or 2 * pw > kw:
        raise ValueError(f"padding {padding} is more than half of the window {k}")
    x = pad2d(x, (pw, pw, ph, ph), value)
    B, C, H, W = x.shape
    columns = im2col(x, (kh, kw), (sh, sw))  # (B, C*kh*kw, L)
    return columns.reshape(B, C, kh * kw, conv_output_size(H, kh, sh), conv_output_size(W, kw, sw))
