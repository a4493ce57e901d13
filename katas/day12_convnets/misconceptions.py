import torch
from torch import nn

from checker.testing import misconception
from reference import day12_convnets as right
from reference.day12_convnets import _pair, _windows

# conv_output_size


def _size(size, n, k):
    if size < 1:
        raise ValueError(f"n {n}, k {k}")
    return size


@misconception(
    "conv_output_size",
    "With dilation 1 your sizes are right, and with more they are too large: a kernel whose taps stand apart still counts as wide as one whose taps touch. What has to fit is all from its first tap to its last.",
)
def conv_output_size__dilation_forgotten(n, k, stride=1, padding=0, dilation=1):
    return _size((n + 2 * padding - k) // stride + 1, n, k)


@misconception(
    "conv_output_size",
    "Your kernel spans one gap too many: k taps have k - 1 gaps between them, and the last tap is one place wide, however large the dilation.",
)
def conv_output_size__one_gap_too_many(n, k, stride=1, padding=0, dilation=1):
    return _size((n + 2 * padding - dilation * k) // stride + 1, n, k)


@misconception(
    "conv_output_size",
    "Where the stride does not divide what is left, you have one window more than fits: it hangs over the end. Such windows are dropped, so the division goes down.",
)
def conv_output_size__ceil(n, k, stride=1, padding=0, dilation=1):
    _size(n + 2 * padding - dilation * (k - 1), n, k)
    return _size(-((dilation * (k - 1) + 1 - n - 2 * padding) // stride) + 1, n, k)


@misconception(
    "conv_output_size",
    "A kernel that is too large by less than one stride is said to fit once. Cutting off decimals rounds a negative number up, to 0, and the 1 that you add makes it a window.",
)
def conv_output_size__rounded_toward_zero(n, k, stride=1, padding=0, dilation=1):
    return _size(int((n + 2 * padding - dilation * (k - 1) - 1) / stride) + 1, n, k)


@misconception(
    "conv_output_size",
    "Sizes that fit are right, but for a kernel that does not you return a number below 1. Whoever makes a tensor of it gets an error far away from here; say it at once.",
)
def conv_output_size__no_error(n, k, stride=1, padding=0, dilation=1):
    return (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1


@misconception("conv_output_size", "The padding is counted once. It is added at both ends of the axis.")
def conv_output_size__padding_once(n, k, stride=1, padding=0, dilation=1):
    return _size((n + padding - dilation * (k - 1) - 1) // stride + 1, n, k)


# pad2d


@misconception(
    "pad2d",
    "Four numbers are read as top, bottom, left, right. Here as in PyTorch they begin with the last axis: left and right first, then top and bottom.",
)
def pad2d__rows_first(x, p, value=0.0):
    return right.pad2d(x, p if isinstance(p, int) or len(p) != 4 else (*p[2:], *p[:2]), value)


@misconception("pad2d", "Your frame is 0, whatever value it should have. Max pooling will need one of -inf.")
def pad2d__always_zeros(x, p, value=0.0):
    return right.pad2d(x, p)


@misconception(
    "pad2d",
    "With nothing to pad you hand back x itself. Whoever writes into the result then changes the image that was given to you.",
)
def pad2d__nothing_to_do(x, p, value=0.0):
    return x if p == 0 else right.pad2d(x, p, value)


# im2col


@misconception(
    "im2col",
    "For a new tensor all is right; for other layouts the patches are a mixture of places. Your strides are computed from the shape, as if x were contiguous; channels_last, a slice and a transpose have the same shape and other strides.",
)
def im2col__assumed_contiguous(x, kernel, stride=1, padding=0, dilation=1):
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = map(_pair, (kernel, stride, padding, dilation))
    if (ph, pw) != (0, 0):
        x = right.pad2d(x, (pw, pw, ph, ph))
    B, C, H, W = x.shape
    Ho, Wo = right.conv_output_size(H, kh, sh, 0, dh), right.conv_output_size(W, kw, sw, 0, dw)
    patches = x.as_strided((B, C, kh, kw, Ho, Wo), (C * H * W, H * W, dh * W, dw, sh * W, sw))
    return patches.reshape(B, C * kh * kw, Ho * Wo)


@misconception(
    "im2col",
    "All numbers are there, but a column goes through the taps first and through the channels inside of each. A kernel that is flattened has its channels outside: all taps of channel 0, then those of channel 1.",
)
def im2col__taps_outside(x, kernel, stride=1, padding=0, dilation=1):
    columns = right.im2col(x, kernel, stride, padding, dilation)
    B, rows, L = columns.shape
    return columns.reshape(B, x.shape[1], rows // x.shape[1], L).transpose(1, 2).reshape(B, rows, L)


@misconception(
    "im2col",
    "Stride and dilation have changed places. That is the order in which F.unfold takes its arguments; this one takes stride, padding, dilation.",
)
def im2col__arguments_of_unfold(x, kernel, stride=1, padding=0, dilation=1):
    return right.im2col(x, kernel, dilation, padding, stride)


@misconception(
    "im2col",
    "Your patches are rows, (B, L, C*kh*kw). They are wanted as columns, so that a kernel as a row can stand to the left of them.",
)
def im2col__patches_as_rows(x, kernel, stride=1, padding=0, dilation=1):
    return right.im2col(x, kernel, stride, padding, dilation).transpose(1, 2)


@misconception(
    "im2col",
    "Your windows walk down the image first, and then to the right. Places are numbered as one reads, or the result of a convolution comes back as a transposed image.",
)
def im2col__down_first(x, kernel, stride=1, padding=0, dilation=1):
    (kh, kw), swapped = _pair(kernel), [_pair(one)[::-1] for one in (stride, padding, dilation)]
    columns = right.im2col(x.mT, (kw, kh), *swapped)
    B, rows, L = columns.shape
    return columns.reshape(B, x.shape[1], kw, kh, L).transpose(2, 3).reshape(B, rows, L)


@misconception(
    "im2col",
    "The patches are right, but you make a padded copy of x even where there is nothing to pad. The strides of x itself are enough then, and the only new memory is the result.",
)
def im2col__always_padded(x, kernel, stride=1, padding=0, dilation=1):
    ph, pw = _pair(padding)
    return right.im2col(right.pad2d(x, (pw, pw, ph, ph)), kernel, stride, 0, dilation)


# conv2d


@misconception(
    "conv2d",
    "The kernel is turned around before it slides. Signal processing calls that convolution; deep learning takes the kernel as it is, which others call cross-correlation. A network that is trained with it will not notice, weights that are loaded will.",
)
def conv2d__flipped(x, w, b=None, **options):
    return right.conv2d(x, w.flip(2, 3), b, **options)


@misconception(
    "conv2d",
    "Without a bias all is right. With one you add it along the last axis, which is the width: it crashes, or where the width happens to equal the number of outputs it runs and is wrong. It belongs on the channel axis.",
)
def conv2d__bias_along_the_width(x, w, b=None, **options):
    if b is None:
        return right.conv2d(x, w, **options)
    right.conv2d(x, w, b, **options)
    return right.conv2d(x, w, **options) + b


@misconception(
    "conv2d",
    "You take the last axis for the channels. Where width and channels differ a shape tells you; where they are equal the image is turned over, and a network trains badly and says nothing. Channels come first.",
)
def conv2d__channels_last(x, w, b=None, **options):
    if x.shape[3] == w.shape[1] * options.get("groups", 1):
        x = x.permute(0, 3, 1, 2)
    return right.conv2d(x, w, b, **options)


@misconception(
    "conv2d",
    "Height and width of the kernel have changed places. With square kernels that is a mirrored one, with others even the size of the result is wrong.",
)
def conv2d__kernel_transposed(x, w, b=None, **options):
    return right.conv2d(x, w.mT, b, **options)


@misconception(
    "conv2d",
    "The dilation has no effect: your taps touch each other, whatever it says, and so the result is larger, too.",
)
def conv2d__dilation_ignored(x, w, b=None, *, stride=1, padding=0, dilation=1, groups=1):
    return right.conv2d(x, w, b, stride=stride, padding=padding, groups=groups)


@misconception(
    "conv2d",
    "Your groups take every groups-th channel. A group is a block of neighbors: the first outputs see the first C/groups channels. Depthwise kernels, with one channel to a group, cannot tell the difference.",
)
def conv2d__groups_interleaved(x, w, b=None, *, groups=1, **options):
    if x.shape[1] == w.shape[1] * groups:
        x = x.unflatten(1, (w.shape[1], groups)).transpose(1, 2).flatten(1, 2)
    return right.conv2d(x, w, b, groups=groups, **options)


@misconception(
    "conv2d",
    "The values are right, but you fill the other groups with zeros and multiply by them: groups times as many FLOPs as needed. That saving is why groups exist.",
)
def conv2d__zeros_between_groups(x, w, b=None, *, groups=1, **options):
    if x.shape[1] != w.shape[1] * groups or w.shape[0] % groups:
        raise ValueError(f"{tuple(x.shape)}, {tuple(w.shape)}")
    if b is not None and b.shape != w.shape[:1]:
        raise ValueError(f"{tuple(b.shape)}, {tuple(w.shape)}")
    group = torch.arange(groups, device=w.device)
    same = group.repeat_interleave(w.shape[0] // groups)[:, None] == group.repeat_interleave(w.shape[1])
    return right.conv2d(x, w.repeat(1, groups, 1, 1) * same[..., None, None], b, **options)


# max_pool2d


@misconception(
    "max_pool2d",
    "Where all values are below 0, the border shows zeros: your padding wins. It must lose to every number there is, and 0 does not.",
)
def max_pool2d__padded_with_zeros(x, k, stride=None, padding=0):
    return _windows(x, k, stride, padding, 0.0).max(dim=2).values


@misconception(
    "max_pool2d",
    "Without a stride your windows move by one place and overlap. For pooling the default is the size of the window, other than for convolutions.",
)
def max_pool2d__stride_of_one(x, k, stride=None, padding=0):
    return right.max_pool2d(x, k, 1 if stride is None else stride, padding)


@misconception(
    "max_pool2d",
    "The values are right, but where several places are equally large each gets a share of the gradient. One winner gets all of it; after a ReLU, with its many zeros, that is no rare case.",
)
def max_pool2d__ties_share(x, k, stride=None, padding=0):
    return _windows(x, k, stride, padding, float("-inf")).amax(dim=2)


@misconception(
    "max_pool2d",
    "Your windows lie over rows and channels, as if images were (B, H, W, C). The axes to pool are the last two; the number of channels stays.",
)
def max_pool2d__channels_last(x, k, stride=None, padding=0):
    return right.max_pool2d(x.permute(0, 3, 1, 2), k, stride, padding).permute(0, 2, 3, 1)


# avg_pool2d


@misconception(
    "avg_pool2d",
    "At the border you divide by the places inside the image, also where padding is to count. With count_include_pad, the default, the divisor is kh * kw everywhere.",
)
def avg_pool2d__padding_never_counts(x, k, stride=None, padding=0, count_include_pad=True):
    return right.avg_pool2d(x, k, stride, padding, False)


@misconception(
    "avg_pool2d",
    "With count_include_pad=False the border is still divided by kh * kw. Then only places inside the image are to count, fewer at an edge and fewest at a corner.",
)
def avg_pool2d__padding_always_counts(x, k, stride=None, padding=0, count_include_pad=True):
    return right.avg_pool2d(x, k, stride, padding, True)


@misconception(
    "avg_pool2d",
    "Without a stride your windows move by one place. As in max pooling, they are to lie side by side: the default is the size of the window.",
)
def avg_pool2d__stride_of_one(x, k, stride=None, padding=0, count_include_pad=True):
    return right.avg_pool2d(x, k, 1 if stride is None else stride, padding, count_include_pad)


# receptive_field


@misconception(
    "receptive_field",
    "The size is counted as if no layer before had a stride. After a stride of 2 each step of a kernel is two steps of the input, after two of them four.",
)
def receptive_field__jump_forgotten(layers):
    return 1 + sum((k - 1) * d for k, _, d in layers), right.receptive_field(layers)[1]


@misconception(
    "receptive_field",
    "A layer's own stride counts in its own size. A kernel walks over the outputs of the layer before, at their distance; how far it moves on afterwards matters to later layers only.",
)
def receptive_field__jump_too_early(layers):
    size = jump = 1
    for k, s, d in layers:
        jump *= s
        size += (k - 1) * d * jump
    return size, jump


@misconception(
    "receptive_field",
    "Dilation does not count in your size. It is made for this: the same taps see more of the input.",
)
def receptive_field__dilation_forgotten(layers):
    return right.receptive_field([(k, s, 1) for k, s, _ in layers])


# Conv2d


@misconception(
    "Conv2d",
    "Your first weights are too large: fan_in is taken to be the number of input channels alone. Every tap of the kernel adds to the same sum, so the area counts as well.",
)
class Conv2d__area_forgotten(right.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)


@misconception(
    "Conv2d",
    "The biases begin at zero. PyTorch draws them as it draws the weights, from U(-1/sqrt(fan_in), 1/sqrt(fan_in)).",
)
class Conv2d__biases_zero(right.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


@misconception(
    "Conv2d",
    "What the layer was told about its padding does not reach the convolution: it computes as with 0, and the images shrink.",
)
class Conv2d__padding_forgotten(right.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.padding = 0


# SmallCNN


def _features(model, x):
    x = right.max_pool2d(torch.relu(model.conv1(x)), 2)
    return torch.relu(model.conv2(x))


@misconception(
    "SmallCNN",
    "The head reads the mean of each channel. One bar is a small part of an image, and of a larger image a smaller one, so what the head sees shrinks with the size. The largest value does not.",
)
class SmallCNN__mean_of_all_places(right.SmallCNN):
    def forward(self, x):
        return self.head(_features(self, x).mean(dim=(2, 3)))


@misconception(
    "SmallCNN",
    "What comes out are probabilities. Logits are asked for: cross entropy takes the softmax itself, and of a second one little is left to learn from.",
)
class SmallCNN__probabilities(right.SmallCNN):
    def forward(self, x):
        return super().forward(x).softmax(dim=1)


@misconception(
    "SmallCNN",
    "There is no ReLU between the two convolutions. Pooling is all that keeps them from being a single linear one.",
)
class SmallCNN__no_first_relu(right.SmallCNN):
    def forward(self, x):
        x = right.max_pool2d(self.conv1(x), 2)
        return self.head(torch.relu(self.conv2(x)).amax(dim=(2, 3)))


# conv_transpose2d


@misconception(
    "conv_transpose2d",
    "The kernel is flipped before it is spread. Each output of the convolution read its window with the kernel as it is, so each y goes back into the same window with the same weights; the flip appears only if you write this as a sliding window over y.",
)
def conv_transpose2d__flipped(y, w, **options):
    return right.conv_transpose2d(y, w.flip(2, 3), **options)


@misconception(
    "conv_transpose2d",
    "The places of output_padding are at the top and on the left. What the convolution leaves out lies at the end of an axis, at the bottom and on the right.",
)
def conv_transpose2d__extra_in_front(y, w, *, output_padding=0, **options):
    x = right.conv_transpose2d(y, w, output_padding=output_padding, **options)
    return x.roll(_pair(output_padding), dims=(2, 3))
