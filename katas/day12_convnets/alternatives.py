import torch
import torch.nn.functional as F
from torch import nn

from checker.testing import alternative
from reference import day12_convnets as right


def _two(size):
    return (size, size) if isinstance(size, int) else tuple(size)


@alternative("conv_output_size")
def conv_output_size__by_counting(n, k, stride=1, padding=0, dilation=1):
    last = n + 2 * padding - dilation * (k - 1)
    starts = range(0, last, stride)
    if len(starts) == 0:
        raise ValueError(f"no window of {k} in {n}")
    return len(starts)


@alternative("pad2d")
def pad2d__by_concatenation(x, p, value=0.0):
    sides = [p] * 4 if isinstance(p, int) else list(p)
    if len(sides) != 4 or any(side < 0 for side in sides):
        raise ValueError(f"p = {p}")
    left, right_, top, bottom = sides
    B, C, H, W = x.shape
    beside = [x.new_full((B, C, H, width), value) for width in (left, right_)]
    x = torch.cat([beside[0], x, beside[1]], dim=3)
    around = [x.new_full((B, C, height, x.shape[3]), value) for height in (top, bottom)]
    return torch.cat([around[0], x, around[1]], dim=2)


@alternative("im2col")
def im2col__by_taps(x, kernel, stride=1, padding=0, dilation=1):
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = _two(kernel), _two(stride), _two(padding), _two(dilation)
    if ph or pw:
        x = right.pad2d(x, (pw, pw, ph, ph))
    B, C, H, W = x.shape
    Ho, Wo = right.conv_output_size(H, kh, sh, 0, dh), right.conv_output_size(W, kw, sw, 0, dw)
    taps = [
        x[:, :, i * dh : i * dh + (Ho - 1) * sh + 1 : sh, j * dw : j * dw + (Wo - 1) * sw + 1 : sw]
        for i in range(kh)
        for j in range(kw)
    ]
    return torch.stack(taps, dim=2).reshape(B, C * kh * kw, Ho * Wo)


@alternative("conv2d")
def conv2d__tap_by_tap(x, w, b=None, *, stride=1, padding=0, dilation=1, groups=1):
    O, Cg, kh, kw = w.shape  # noqa: E741
    if x.shape[1] != Cg * groups or O % groups != 0:
        raise ValueError(f"{tuple(x.shape)} and {tuple(w.shape)}")
    if b is not None and tuple(b.shape) != (O,):
        raise ValueError(f"{tuple(b.shape)} and {tuple(w.shape)}")
    (sh, sw), (ph, pw), (dh, dw) = _two(stride), _two(padding), _two(dilation)
    Ho = right.conv_output_size(x.shape[2], kh, sh, ph, dh)
    Wo = right.conv_output_size(x.shape[3], kw, sw, pw, dw)
    x = right.pad2d(x, (pw, pw, ph, ph)).unflatten(1, (groups, Cg))
    w = w.unflatten(0, (groups, O // groups))
    y = 0
    for i in range(kh):
        for j in range(kw):
            seen = x[..., i * dh : i * dh + (Ho - 1) * sh + 1 : sh, j * dw : j * dw + (Wo - 1) * sw + 1 : sw]
            y = y + torch.einsum("bgchw,goc->bgohw", seen, w[..., i, j])
    y = y.flatten(1, 2)
    return y if b is None else y + b.view(1, -1, 1, 1)


def _unfolded(x, k, stride, padding, value):
    (kh, kw), (ph, pw) = _two(k), _two(padding)
    sh, sw = (kh, kw) if stride is None else _two(stride)
    if ph > kh / 2 or pw > kw / 2:
        raise ValueError(f"padding {padding}, k {k}")
    x = F.pad(x, (pw, pw, ph, ph), value=value)
    if x.shape[2] < kh or x.shape[3] < kw:
        raise ValueError(f"{k} does not fit into {tuple(x.shape)}")
    return x.unfold(2, kh, sh).unfold(3, kw, sw).flatten(-2)


@alternative("max_pool2d")
def max_pool2d__by_argmax(x, k, stride=None, padding=0):
    windows = _unfolded(x, k, stride, padding, -torch.inf)
    return windows.gather(-1, windows.argmax(dim=-1, keepdim=True)).squeeze(-1)


@alternative("avg_pool2d")
def avg_pool2d__by_unfold(x, k, stride=None, padding=0, count_include_pad=True):
    windows = _unfolded(x, k, stride, padding, 0.0)
    if count_include_pad:
        return windows.sum(-1) / windows.shape[-1]
    return windows.sum(-1) / _unfolded(torch.ones_like(x), k, stride, padding, 0.0).sum(-1)


@alternative("receptive_field")
def receptive_field__from_the_end(layers):
    size, jump = 1, 1
    for k, s, d in reversed(layers):
        size = (size - 1) * s + d * (k - 1) + 1
        jump = jump * s
    return size, jump


@alternative("Conv2d")
class Conv2d__drawn_at_once(nn.Module):
    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        c_in, c_out = in_channels, out_channels
        if c_in % groups != 0 or c_out % groups != 0:
            raise ValueError(f"{c_in} and {c_out} in {groups} groups")
        kh, kw = _two(kernel_size)
        width = c_in // groups * kh * kw
        options = {"device": device, "dtype": dtype}
        self.options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        self.weight = nn.Parameter((2 * torch.rand(c_out, c_in // groups, kh, kw, **options) - 1) / width**0.5)
        start = nn.Parameter((2 * torch.rand(c_out, **options) - 1) / width**0.5) if bias else None
        self.register_parameter("bias", start)

    def forward(self, x):
        return right.conv2d(x, self.weight, self.bias, **self.options)


@alternative("SmallCNN")
class SmallCNN__of_torch(nn.Module):
    def __init__(self, n_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding="same")
        self.head = nn.Linear(16, n_classes)

    def forward(self, x):
        x = self.conv2(F.relu(F.max_pool2d(self.conv1(x), 2)))
        return self.head(F.relu(x.flatten(2).max(dim=2).values))


@alternative("conv_transpose2d")
def conv_transpose2d__zeros_between(y, w, *, stride=1, padding=0, output_padding=0, dilation=1, groups=1):
    O, Cg, kh, kw = w.shape  # noqa: E741
    if y.shape[1] != O or O % groups != 0:
        raise ValueError(f"{tuple(y.shape)} and {tuple(w.shape)}")
    (sh, sw), (ph, pw), (dh, dw), (oh, ow) = _two(stride), _two(padding), _two(dilation), _two(output_padding)
    if oh > sh - 1 or ow > sw - 1:
        raise ValueError(f"{output_padding} and {stride}")
    apart = y.new_zeros(y.shape[0], O, (y.shape[2] - 1) * sh + 1, (y.shape[3] - 1) * sw + 1)
    apart[:, :, ::sh, ::sw] = y
    apart = right.pad2d(apart, (dw * (kw - 1), dw * (kw - 1) + ow, dh * (kh - 1), dh * (kh - 1) + oh))
    turned = w.unflatten(0, (groups, O // groups)).transpose(1, 2).flatten(0, 1).flip(2, 3)
    x = right.conv2d(apart, turned, dilation=dilation, groups=groups)
    H, W = x.shape[2] - 2 * ph, x.shape[3] - 2 * pw
    if H < 1 or W < 1:
        raise ValueError("nothing is left")
    return x[:, :, ph : ph + H, pw : pw + W]
