"""Known wrong solutions of day 2, each with the sentence for whoever wrote it."""

import torch

from checker.testing import misconception
from reference.day02_tensor_operations import broadcast_shape, logsumexp, softmax

INF = float("inf")


def wide(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def finite(top):
    return torch.where(top.isfinite(), top, 0.0)


def fit(mask, x):
    if mask is None:
        return torch.ones(x.shape, dtype=torch.bool, device=x.device)
    if broadcast_shape(tuple(mask.shape), tuple(x.shape)) != tuple(x.shape):
        raise ValueError(f"mask {tuple(mask.shape)} does not broadcast to x {tuple(x.shape)}")
    return mask.expand(x.shape)


def same_shapes(pred, target):
    if pred.shape != target.shape:
        raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)} differ in shape")


def same_widths(a, b):
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} hold points of different widths")


# broadcast_shape


@misconception(
    "broadcast_shape",
    "The shorter shape was filled up with 1s at its end. Shapes meet at their last axes, so (3,) "
    "against (1, 3) means (1, 3) against (1, 3).",
)
def broadcast_shape__aligned_at_the_first_axis(a, b):
    rank = max(len(a), len(b))
    sizes = []
    for m, n in zip((*a, *(1,) * (rank - len(a))), (*b, *(1,) * (rank - len(b))), strict=True):
        if m != n and 1 not in (m, n):
            raise ValueError(f"{a} and {b} do not broadcast")
        sizes.append(n if m == 1 else m)
    return tuple(sizes)


@misconception(
    "broadcast_shape",
    "The answer ends where the shorter shape ends: the axes that only the longer shape has are missing.",
)
def broadcast_shape__extra_axes_dropped(a, b):
    sizes = []
    for m, n in zip(reversed(a), reversed(b), strict=False):
        if m != n and 1 not in (m, n):
            raise ValueError(f"{a} and {b} do not broadcast")
        sizes.append(n if m == 1 else m)
    return tuple(reversed(sizes))


@misconception(
    "broadcast_shape",
    "The larger of two sizes is right until one of them is 0: a 1 across from a 0 becomes 0, and nothing is left.",
)
def broadcast_shape__larger_size_wins(a, b):
    rank = max(len(a), len(b))
    sizes = []
    for m, n in zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True):
        if m != n and 1 not in (m, n):
            raise ValueError(f"{a} and {b} do not broadcast")
        sizes.append(max(m, n))
    return tuple(sizes)


@misconception(
    "broadcast_shape",
    "Two different sizes, neither of them 1, got an answer. Only a 1 can be stretched; 2 across from 3, "
    "or from 6, is an error.",
)
def broadcast_shape__anything_fits(a, b):
    rank = max(len(a), len(b))
    pairs = zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True)
    return tuple(n if m == 1 else m for m, n in pairs)


# column_mse


@misconception(
    "column_mse",
    "You have one number per row. The axis that you name in a reduction is the one that disappears, and "
    "here the rows are to disappear.",
)
def column_mse__one_number_per_row(pred, target):
    same_shapes(pred, target)
    return (pred - target).square().mean(dim=1)


@misconception(
    "column_mse",
    "A mean without an axis runs over everything and leaves one number, where one per column is wanted.",
)
def column_mse__one_number_for_all(pred, target):
    same_shapes(pred, target)
    return (pred - target).square().mean()


@misconception(
    "column_mse",
    "Shapes that are not equal went through, because subtraction stretches what it can: (N, 1) minus "
    "(N,) is a table of N times N differences, most of them between strangers. Compare the shapes "
    "before you subtract.",
)
def column_mse__silent_broadcast(pred, target):
    return (pred - target).square().mean(dim=0)


@misconception(
    "column_mse",
    "The differences were averaged first and squared afterwards, so errors of opposite sign cancel.",
)
def column_mse__square_of_the_mean(pred, target):
    same_shapes(pred, target)
    return (pred - target).mean(dim=0).square()


@misconception(
    "column_mse",
    "This is the sum over the rows. The mean also divides by how many rows there are.",
)
def column_mse__sum(pred, target):
    same_shapes(pred, target)
    return (pred - target).square().sum(dim=0)


@misconception(
    "column_mse",
    "These are mean absolute differences; the differences are to be squared.",
)
def column_mse__absolute(pred, target):
    same_shapes(pred, target)
    return (pred - target).abs().mean(dim=0)


@misconception(
    "column_mse",
    "This is the root of the mean squared difference: leave the root out.",
)
def column_mse__root(pred, target):
    same_shapes(pred, target)
    return (pred - target).square().mean(dim=0).sqrt()


# standardize


@misconception(
    "standardize",
    "Your rows come out a little too small, and NaN when D is 1: the spread was divided by D - 1, which "
    "is the default of std and var in torch. Statistics of a layer divide by D.",
)
def standardize__unbiased_variance(x, eps=1e-5):
    y = wide(x)
    centered = y - y.mean(-1, keepdim=True)
    return (centered / (y.var(-1, keepdim=True) + eps).sqrt()).to(x.dtype)


@misconception(
    "standardize",
    "The statistics were taken down the first axis, so it is the columns that have mean 0. Each row, "
    "the last axis, is to be standardized by itself.",
)
def standardize__first_axis(x, eps=1e-5):
    y = wide(x)
    centered = y - y.mean(0, keepdim=True)
    return (centered / (centered.square().mean(0, keepdim=True) + eps).sqrt()).to(x.dtype)


@misconception(
    "standardize",
    "One mean and one variance were taken over the whole tensor. Each row has its own.",
)
def standardize__whole_tensor(x, eps=1e-5):
    y = wide(x)
    centered = y - y.mean()
    return (centered / (centered.square().mean() + eps).sqrt()).to(x.dtype)


@misconception(
    "standardize",
    "eps was added to the root of the variance. It belongs beside the variance, under the root; for "
    "rows with a small spread that is a different number.",
)
def standardize__eps_outside_the_root(x, eps=1e-5):
    y = wide(x)
    centered = y - y.mean(-1, keepdim=True)
    return (centered / (centered.square().mean(-1, keepdim=True).sqrt() + eps)).to(x.dtype)


@misconception(
    "standardize",
    "eps has no influence on your result, so a row of equal entries is divided by 0 and becomes NaN.",
)
def standardize__without_eps(x, eps=1e-5):
    y = wide(x)
    centered = y - y.mean(-1, keepdim=True)
    return (centered / centered.square().mean(-1, keepdim=True).sqrt()).to(x.dtype)


@misconception(
    "standardize",
    "The variance was taken as the mean of the squares minus the square of the mean. Around 10,000 both "
    "are near 100,000,000, where float32 counts in steps of 8, and the variance of 1 between them is "
    "lost. Subtract the mean before you square.",
)
def standardize__difference_of_squares(x, eps=1e-5):
    y = wide(x)
    mean = y.mean(-1, keepdim=True)
    variance = y.square().mean(-1, keepdim=True) - mean.square()
    return ((y - mean) / (variance + eps).sqrt()).to(x.dtype)


@misconception(
    "standardize",
    "You divided by the variance itself. The spread of a row is its root.",
)
def standardize__divided_by_the_variance(x, eps=1e-5):
    y = wide(x)
    centered = y - y.mean(-1, keepdim=True)
    return (centered / (centered.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


@misconception(
    "standardize",
    "The values are right and the gradient is not: mean and variance were treated as constants. They "
    "move when x moves.",
)
def standardize__constant_statistics(x, eps=1e-5):
    y = wide(x)
    with torch.no_grad():
        mean, variance = y.mean(-1, keepdim=True), y.var(-1, correction=0, keepdim=True)
    return ((y - mean) / (variance + eps).sqrt()).to(x.dtype)


@misconception(
    "standardize",
    "Half precision was kept for the statistics: squares of 1000 overflow in float16, and a mean near "
    "100 has steps of a half in bfloat16. Go up to float32 first, and come back at the end.",
)
def standardize__statistics_in_half(x, eps=1e-5):
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()


@misconception(
    "standardize",
    "Everything went through float32, so float64 inputs lost half of their digits. Only half inputs "
    "need another dtype.",
)
def standardize__always_float32(x, eps=1e-5):
    y = x.float()
    centered = y - y.mean(-1, keepdim=True)
    return (centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)


@misconception(
    "standardize",
    "Half inputs come back in float32. The statistics are right, but the result has the dtype of x.",
)
def standardize__result_stays_float32(x, eps=1e-5):
    y = wide(x)
    centered = y - y.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()


# logsumexp


@misconception(
    "logsumexp",
    "exp was taken of the entries as they are. From 89 on it is inf in float32, and far below 0 it is "
    "0, whose log is -inf. Take the largest entry of each row out of the sum first, and put it back "
    "after the log.",
)
def logsumexp__straight_from_the_formula(x, dim, keepdim=False):
    return wide(x).exp().sum(dim, keepdim=keepdim).log().to(x.dtype)


@misconception(
    "logsumexp",
    "All rows were shifted by the largest entry of the whole tensor. A row that lies 1000 below it "
    "becomes exp(-1000) = 0, and its log -inf. Each row needs its own maximum.",
)
def logsumexp__global_maximum(x, dim, keepdim=False):
    if x.shape[dim] == 0:
        return x.sum(dim, keepdim=keepdim).log()
    y = wide(x)
    shift = finite(y.max()) if y.numel() else 0.0
    return ((y - shift).exp().sum(dim, keepdim=keepdim).log() + shift).to(x.dtype)


@misconception(
    "logsumexp",
    "Your result lies below the right one by exactly the maximum of each row: it was subtracted and never added back.",
)
def logsumexp__maximum_not_added_back(x, dim, keepdim=False):
    if x.shape[dim] == 0:
        return x.sum(dim, keepdim=keepdim).log()
    y = wide(x)
    return (y - finite(y.amax(dim, keepdim=True))).exp().sum(dim, keepdim=keepdim).log().to(x.dtype)


@misconception(
    "logsumexp",
    "A row of -inf became NaN: its maximum is -inf, and -inf minus -inf is not a number. Shift such a "
    "row by something finite.",
)
def logsumexp__infinite_shift(x, dim, keepdim=False):
    if x.shape[dim] == 0:
        return x.sum(dim, keepdim=keepdim).log()
    y = wide(x)
    top = y.amax(dim, keepdim=True)
    result = top + (y - top).exp().sum(dim, keepdim=True).log()
    return (result if keepdim else result.squeeze(dim)).to(x.dtype)


@misconception(
    "logsumexp",
    "The shift was made safe for -inf only. A row with +inf in it still computes inf minus inf, which is NaN.",
)
def logsumexp__only_minus_infinity_is_safe(x, dim, keepdim=False):
    if x.shape[dim] == 0:
        return x.sum(dim, keepdim=keepdim).log()
    y = wide(x)
    top = y.amax(dim, keepdim=True)
    top = top.masked_fill(top == -INF, 0.0)
    result = top + (y - top).exp().sum(dim, keepdim=True).log()
    return (result if keepdim else result.squeeze(dim)).to(x.dtype)


@misconception(
    "logsumexp",
    "squeeze() without an axis removes every axis of size 1, also those of x that nobody summed over.",
)
def logsumexp__all_ones_squeezed(x, dim, keepdim=False):
    result = logsumexp(x, dim, keepdim=True)
    return result if keepdim else result.squeeze()


@misconception(
    "logsumexp",
    "The summed axis is gone although keepdim=True was asked for; it should stay, with size 1.",
)
def logsumexp__keepdim_ignored(x, dim, keepdim=False):
    return logsumexp(x, dim)


@misconception(
    "logsumexp",
    "The summed axis is still there with size 1. It stays only when keepdim=True is asked for.",
)
def logsumexp__always_keepdim(x, dim, keepdim=False):
    return logsumexp(x, dim, keepdim=True)


@misconception(
    "logsumexp",
    "The sum was formed in half precision, where float16 ends at 65,504. Go up to float32 for the sum, "
    "and come back at the end.",
)
def logsumexp__sum_in_half(x, dim, keepdim=False):
    if x.shape[dim] == 0:
        return x.sum(dim, keepdim=keepdim).log()
    top = finite(x.amax(dim, keepdim=True))
    result = top + (x - top).exp().sum(dim, keepdim=True).log()
    return result if keepdim else result.squeeze(dim)


@misconception(
    "logsumexp",
    "Everything went through float32, so float64 inputs lost half of their digits. Only half inputs "
    "need another dtype.",
)
def logsumexp__always_float32(x, dim, keepdim=False):
    return logsumexp(x.float(), dim, keepdim).to(x.dtype)


# softmax


@misconception(
    "softmax",
    "exp was taken of the scores as they are: large ones give inf / inf, very low ones 0 / 0, and both "
    "are NaN. The weights do not change when each row is first lowered by its own maximum.",
)
def softmax__straight_from_the_formula(x, dim=-1):
    if x.dim() == 0:
        raise ValueError("no axis")
    weights = wide(x).exp()
    return (weights / weights.sum(dim, keepdim=True)).to(x.dtype)


@misconception(
    "softmax",
    "One maximum was taken over the whole tensor. Rows that lie far below it get exp(-1000) = 0 "
    "everywhere, and then 0 / 0. Each row needs its own maximum.",
)
def softmax__global_maximum(x, dim=-1):
    if x.dim() == 0:
        raise ValueError("no axis")
    if x.numel() == 0:
        return x.clone()
    weights = (wide(x) - wide(x).max()).exp()
    return (weights / weights.sum(dim, keepdim=True)).to(x.dtype)


@misconception(
    "softmax",
    "dim has no influence: the weights sum to 1 along the last axis whatever was asked for.",
)
def softmax__always_the_last_axis(x, dim=-1):
    return softmax(x, -1)


@misconception(
    "softmax",
    "The sums lost their axis before you divided, so they were lined up with the wrong one, or with "
    "none. Keep the summed axis with size 1 and each row meets its own sum.",
)
def softmax__sum_without_its_axis(x, dim=-1):
    if x.dim() == 0:
        raise ValueError("no axis")
    if x.shape[dim] == 0:
        return x.clone()
    weights = (wide(x) - wide(x).amax(dim, keepdim=True)).exp()
    return (weights / weights.sum(dim)).to(x.dtype)


@misconception(
    "softmax",
    "The digits of your weights wear off as the scores grow. Near 10,000 float32 has steps of 0.001, "
    "and a maximum plus a logarithm in one number is rounded to them before it is subtracted. Subtract "
    "the maximum alone, which is exact here.",
)
def softmax__by_way_of_logsumexp(x, dim=-1):
    if x.dim() == 0:
        raise ValueError("no axis")
    return (wide(x) - logsumexp(wide(x), dim, keepdim=True)).exp().to(x.dtype)


@misconception(
    "softmax",
    "A single number without axes got the weight 1. There is no axis to sum over, and a caller who "
    "passes this has made a mistake: say so with a ValueError.",
)
def softmax__accepts_no_axes(x, dim=-1):
    return softmax(x, dim) if x.dim() else torch.ones_like(x)


@misconception(
    "softmax",
    "The weights were computed in half precision, and each step rounded them again: the sum overflows "
    "in float16, and differences of scores lose bits in bfloat16. Go up to float32 first.",
)
def softmax__in_half(x, dim=-1):
    if x.dim() == 0:
        raise ValueError("no axis")
    if x.shape[dim] == 0:
        return x.clone()
    weights = (x - x.amax(dim, keepdim=True)).exp()
    return weights / weights.sum(dim, keepdim=True)


@misconception(
    "softmax",
    "Everything went through float32, so float64 inputs lost half of their digits. Only half inputs "
    "need another dtype.",
)
def softmax__always_float32(x, dim=-1):
    return softmax(x.float(), dim).to(x.dtype)


@misconception(
    "softmax",
    "The weights are right, but half inputs come back in float32. The result has the dtype of x.",
)
def softmax__result_stays_float32(x, dim=-1):
    return softmax(wide(x), dim)


@misconception(
    "softmax",
    "The values are right and the gradient is not: the sum was treated as a constant, as if a score "
    "could raise its own weight without lowering the others.",
)
def softmax__constant_sum(x, dim=-1):
    if x.dim() == 0:
        raise ValueError("no axis")
    if x.shape[dim] == 0:
        return x.clone()
    weights = (wide(x) - wide(x).amax(dim, keepdim=True).detach()).exp()
    return (weights / weights.sum(dim, keepdim=True).detach()).to(x.dtype)


# masked_softmax


@misconception(
    "masked_softmax",
    "The mask was applied after the softmax. The hidden entries took part in the sum, so the weights "
    "that are kept no longer add up to 1.",
)
def masked_softmax__mask_after_the_softmax(x, mask, dim=-1):
    return softmax(x, dim).masked_fill(~fit(mask, x), 0.0)


@misconception(
    "masked_softmax",
    "The weights were cut and divided by their new sum, but exp and its maximum had seen the hidden "
    "scores before. One huge hidden score turns all that is allowed into exp(-10,000) = 0, and inf or "
    "NaN spoil the row.",
)
def masked_softmax__renormalized_afterwards(x, mask, dim=-1):
    weights = softmax(wide(x), dim).masked_fill(~fit(mask, x), 0.0)
    total = weights.sum(dim, keepdim=True)
    return (weights / total.masked_fill(total == 0, 1.0)).to(x.dtype)


@misconception(
    "masked_softmax",
    "The NaN of a row with nothing allowed was replaced after the softmax. The values are right, but "
    "backward still runs through that row, and 0 times NaN is NaN. Make the scores harmless before the "
    "softmax.",
)
def masked_softmax__nan_replaced_afterwards(x, mask, dim=-1):
    scores = x + torch.zeros_like(x).masked_fill(~fit(mask, x), -INF)
    return softmax(scores, dim).nan_to_num(0.0)


@misconception(
    "masked_softmax",
    "The mask is read the wrong way round: the weights lie where it is False. True means that an entry may be used.",
)
def masked_softmax__mask_inverted(x, mask, dim=-1):
    if mask is None:
        return softmax(x, dim)
    mask = ~fit(mask, x)
    scores = x.masked_fill(~mask, -INF).masked_fill(~mask.any(dim, keepdim=True), 0.0)
    return softmax(scores, dim).masked_fill(~mask, 0.0)


@misconception(
    "masked_softmax",
    "Hidden scores were multiplied by 0. A score of 0 is not a low score: exp(0) is 1, and it takes its share.",
)
def masked_softmax__scores_times_mask(x, mask, dim=-1):
    return softmax(x * fit(mask, x), dim)


@misconception(
    "masked_softmax",
    "Scores of -inf are right for hidden entries, but a row that consists of them becomes 0 / 0 = NaN. "
    "Say what such a row means; here it gives zeros.",
)
def masked_softmax__rows_of_minus_infinity(x, mask, dim=-1):
    return softmax(x.masked_fill(~fit(mask, x), -INF), dim)


@misconception(
    "masked_softmax",
    "Hidden scores got a large negative number. Where nothing is allowed they are all equal and share "
    "the weight, where an allowed score is lower still they win, and float16 cannot hold such a number "
    "at all.",
)
def masked_softmax__large_negative_number(x, mask, dim=-1):
    return softmax(wide(x).masked_fill(~fit(mask, x), -1e9), dim).to(x.dtype)


@misconception(
    "masked_softmax",
    "A number was added to the hidden scores. NaN plus anything is NaN and inf minus inf too, so what "
    "stands under the mask leaks out. Replace the scores, do not add to them.",
)
def masked_softmax__added_to_the_scores(x, mask, dim=-1):
    mask = fit(mask, x)
    scores = x + torch.zeros_like(x).masked_fill(~mask, -INF)
    scores = scores.masked_fill(~mask.any(dim, keepdim=True), 0.0)
    return softmax(scores, dim).masked_fill(~mask, 0.0)


@misconception(
    "masked_softmax",
    "dim has no influence: the weights sum to 1 along the last axis whatever was asked for.",
)
def masked_softmax__always_the_last_axis(x, mask, dim=-1):
    if mask is None:
        return softmax(x, -1)
    mask = fit(mask, x)
    scores = x.masked_fill(~mask, -INF).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return softmax(scores, -1).masked_fill(~mask, 0.0)


@misconception(
    "masked_softmax",
    "A mask that is larger than x went through and stretched the scores, and one that does not fit died "
    "inside torch. Compare the shapes first and name both.",
)
def masked_softmax__no_look_at_the_shapes(x, mask, dim=-1):
    if mask is None:
        return softmax(x, dim)
    x, mask = torch.broadcast_tensors(x, mask)
    scores = x.masked_fill(~mask, -INF).masked_fill(~mask.any(dim, keepdim=True), 0.0)
    return softmax(scores, dim).masked_fill(~mask, 0.0)


@misconception(
    "masked_softmax",
    "The weights were computed in half precision, and each step rounded them again. Go up to float32 first.",
)
def masked_softmax__in_half(x, mask, dim=-1):
    if x.numel() == 0:
        return x.clone()
    mask = fit(mask, x)
    scores = x.masked_fill(~mask, -INF)
    weights = (scores - finite(scores.amax(dim, keepdim=True))).exp()
    total = weights.sum(dim, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


# masked_mean


def settle(total, count, x):
    return (total / count.clamp(min=1)).to(x.dtype)


@misconception(
    "masked_mean",
    "You divided by the number of all entries, hidden ones included, so the mean is pulled towards 0. "
    "Count what is kept.",
)
def masked_mean__divided_by_everything(x, mask, dim=None, keepdim=False):
    y, mask = wide(x).masked_fill(~fit(mask, x), 0.0), fit(mask, x)
    return settle(y.sum(dim, keepdim=keepdim), torch.ones_like(mask).sum(dim, keepdim=keepdim), x)


@misconception(
    "masked_mean",
    "Hidden entries were multiplied by 0. That removes every number except inf and NaN, and 0 times "
    "these is NaN. Choose what to sum, do not multiply.",
)
def masked_mean__times_the_mask(x, mask, dim=None, keepdim=False):
    mask = fit(mask, x)
    return settle((wide(x) * mask).sum(dim, keepdim=keepdim), mask.sum(dim, keepdim=keepdim), x)


@misconception(
    "masked_mean",
    "The True entries of the mask were counted as it came. After broadcasting each of them stands for "
    "several entries of x: count after stretching.",
)
def masked_mean__count_before_stretching(x, mask, dim=None, keepdim=False):
    total = wide(x).masked_fill(~fit(mask, x), 0.0).sum(dim, keepdim=keepdim)
    mask = fit(None, x) if mask is None else mask
    return settle(total, mask.sum(dim, keepdim=keepdim), x)


@misconception(
    "masked_mean",
    "Where nothing is kept you divide 0 by 0. Such a mean is to be 0, without ever computing the NaN.",
)
def masked_mean__zero_over_zero(x, mask, dim=None, keepdim=False):
    mask = fit(mask, x)
    total = (wide(x) * mask).sum(dim, keepdim=keepdim)
    return (total / mask.sum(dim, keepdim=keepdim)).to(x.dtype)


@misconception(
    "masked_mean",
    "Where nothing is kept the value is right and the gradient is NaN: where picks among results, yet "
    "backward also runs through the division by 0 that was not picked, and 0 times inf is NaN. Make the "
    "divisor safe first, and choose what to sum instead of multiplying by 0.",
)
def masked_mean__where_after_the_division(x, mask, dim=None, keepdim=False):
    mask = fit(mask, x)
    total, count = (wide(x) * mask).sum(dim, keepdim=keepdim), mask.sum(dim, keepdim=keepdim)
    return torch.where(count > 0, total / count, 0.0).to(x.dtype)


@misconception(
    "masked_mean",
    "Each sum was divided by the count of the whole mask. With a dim, each mean has its own count.",
)
def masked_mean__one_count_for_all(x, mask, dim=None, keepdim=False):
    mask = fit(mask, x)
    return settle(wide(x).masked_fill(~mask, 0.0).sum(dim, keepdim=keepdim), mask.sum(), x)


@misconception(
    "masked_mean",
    "Something small was added to the count. That hides 0 / 0, but it also shifts every other mean, in "
    "float64 visibly.",
)
def masked_mean__small_number_added(x, mask, dim=None, keepdim=False):
    mask = fit(mask, x)
    total = wide(x).masked_fill(~mask, 0.0).sum(dim, keepdim=keepdim)
    return (total / (mask.sum(dim, keepdim=keepdim).to(total.dtype) + 1e-8)).to(x.dtype)


@misconception(
    "masked_mean",
    "This is the mean of the rows' means: a row with one kept entry weighs as much as a row with five. "
    "Add up all kept entries, then divide once.",
)
def masked_mean__mean_of_means(x, mask, dim=None, keepdim=False):
    mask = fit(mask, x)
    total, count = wide(x).masked_fill(~mask, 0.0), mask
    if dim is not None:
        return settle(total.sum(dim, keepdim=keepdim), count.sum(dim, keepdim=keepdim), x)
    means = total.sum(-1) / count.sum(-1).clamp(min=1)
    return means.mean().reshape([1] * x.dim() if keepdim else []).to(x.dtype)


@misconception(
    "masked_mean",
    "The mask is read the wrong way round: these are the means of what it hides. True means that an entry is kept.",
)
def masked_mean__mask_inverted(x, mask, dim=None, keepdim=False):
    mask = fit(mask, x) if mask is None else ~fit(mask, x)
    return settle(wide(x).masked_fill(~mask, 0.0).sum(dim, keepdim=keepdim), mask.sum(dim, keepdim=keepdim), x)


@misconception(
    "masked_mean",
    "The reduced axes are gone although keepdim=True was asked for; they should stay, with size 1.",
)
def masked_mean__keepdim_ignored(x, mask, dim=None, keepdim=False):
    mask = fit(mask, x)
    return settle(wide(x).masked_fill(~mask, 0.0).sum(dim), mask.sum(dim), x)


@misconception(
    "masked_mean",
    "A mask that is larger than x went through and stretched x, and one that does not fit died inside "
    "torch. Compare the shapes first and name both.",
)
def masked_mean__no_look_at_the_shapes(x, mask, dim=None, keepdim=False):
    y, mask = torch.broadcast_tensors(wide(x), fit(None, x) if mask is None else mask)
    return settle(y.masked_fill(~mask, 0.0).sum(dim, keepdim=keepdim), mask.sum(dim, keepdim=keepdim), x)


@misconception(
    "masked_mean",
    "The total was formed in half precision and overflowed, although the mean is a small number. Sum in float32.",
)
def masked_mean__total_in_half(x, mask, dim=None, keepdim=False):
    mask = fit(mask, x)
    return settle(x.masked_fill(~mask, 0.0).sum(dim, keepdim=keepdim), mask.sum(dim, keepdim=keepdim), x)


@misconception(
    "masked_mean",
    "Everything went through float32, so float64 inputs lost half of their digits. Only half inputs "
    "need another dtype.",
)
def masked_mean__always_float32(x, mask, dim=None, keepdim=False):
    mask = fit(mask, x)
    return settle(x.float().masked_fill(~mask, 0.0).sum(dim, keepdim=keepdim), mask.sum(dim, keepdim=keepdim), x)


# pairwise_sq_dist


def expanded(u, v):
    return u.square().sum(1)[:, None] + v.square().sum(1) - 2 * (u @ v.T)


@misconception(
    "pairwise_sq_dist",
    "Some squared distances came out below 0. In |a|^2 + |b|^2 - 2ab three large numbers cancel for "
    "nearby points, and what remains is rounding of either sign; a root taken later would be NaN.",
)
def pairwise_sq_dist__negative_distances(a, b):
    same_widths(a, b)
    return expanded(wide(a), wide(b)).to(a.dtype)


@misconception(
    "pairwise_sq_dist",
    "The numbers are right, but all N * M * D differences stood in memory at once: D times the answer. "
    "Expand the square, or go through it piece by piece.",
)
def pairwise_sq_dist__table_of_differences(a, b):
    same_widths(a, b)
    return (wide(a)[:, None] - wide(b)).square().sum(-1).to(a.dtype)


@misconception(
    "pairwise_sq_dist",
    "These are the distances. Their squares are asked for, so leave the root out.",
)
def pairwise_sq_dist__root(a, b):
    same_widths(a, b)
    return expanded(wide(a), wide(b)).clamp(min=0).sqrt().to(a.dtype)


@misconception(
    "pairwise_sq_dist",
    "The mixed term has the wrong sign: these are the squares of |a + b|. A row lies 0 from itself, not "
    "four times its own square.",
)
def pairwise_sq_dist__square_of_the_sum(a, b):
    same_widths(a, b)
    return expanded(wide(a), -wide(b)).clamp(min=0).to(a.dtype)


@misconception(
    "pairwise_sq_dist",
    "The mixed term of (a - b)^2 is there twice, and you took it once: a row should lie 0 from itself.",
)
def pairwise_sq_dist__single_mixed_term(a, b):
    same_widths(a, b)
    u, v = wide(a), wide(b)
    return (u.square().sum(1)[:, None] + v.square().sum(1) - u @ v.T).clamp(min=0).to(a.dtype)


@misconception(
    "pairwise_sq_dist",
    "Your numbers are the right ones divided by D: the squared differences of a pair are to be added up, not averaged.",
)
def pairwise_sq_dist__mean_over_the_width(a, b):
    same_widths(a, b)
    return (expanded(wide(a), wide(b)).clamp(min=0) / a.shape[1]).to(a.dtype)


@misconception(
    "pairwise_sq_dist",
    "Points of different widths were not noticed before torch did, or were stretched to fit. Compare "
    "the last sizes first and name both shapes.",
)
def pairwise_sq_dist__no_look_at_the_widths(a, b):
    u, v = wide(a), wide(b)
    return expanded(u, v).clamp(min=0).to(a.dtype)


@misconception(
    "pairwise_sq_dist",
    "The squares were formed in half precision. Far from 0 they overflow in float16 and lose all digits "
    "of the difference in bfloat16. Go up to float32 first.",
)
def pairwise_sq_dist__in_half(a, b):
    same_widths(a, b)
    return expanded(a, b).clamp(min=0)


@misconception(
    "pairwise_sq_dist",
    "Everything went through float32, so float64 inputs lost half of their digits. Only half inputs "
    "need another dtype.",
)
def pairwise_sq_dist__always_float32(a, b):
    same_widths(a, b)
    return expanded(a.float(), b.float()).clamp(min=0).to(a.dtype)


# chunked_logsumexp


def pair_of(chunk):
    if chunk.shape[-1] == 0:
        return chunk.sum(-1) - INF, chunk.sum(-1)
    top = chunk.amax(-1)
    return top, (chunk - finite(top)[..., None]).exp().sum(-1)


def merged(one, two):
    top = torch.maximum(one[0], two[0])
    shift = finite(top)
    return top, one[1] * (one[0] - shift).exp() + two[1] * (two[0] - shift).exp()


def fold(chunks, summarize, merge, finish, *, check=True, up=wide):
    state = dtype = shape = None
    for chunk in chunks:
        part = summarize(up(chunk))
        if state is None:
            state, dtype, shape = part, chunk.dtype, chunk.shape[:-1]
            continue
        if check and chunk.shape[:-1] != shape:
            raise ValueError(f"{tuple(chunk.shape[:-1])} after {tuple(shape)}")
        state = merge(state, part)
    if state is None:
        raise ValueError("no chunk")
    return finish(state).to(dtype)


def finished(state):
    return state[0] + state[1].log()


@misconception(
    "chunked_logsumexp",
    "All chunks were joined before anything was summed, so all of them are in memory together. A chunk "
    "may be forgotten as soon as its maximum and its sum are known.",
)
def chunked_logsumexp__joined_first(chunks):
    chunks = list(chunks)
    if not chunks:
        raise ValueError("no chunk")
    for chunk in chunks:
        if chunk.shape[:-1] != chunks[0].shape[:-1]:
            raise ValueError(f"{tuple(chunk.shape[:-1])} after {tuple(chunks[0].shape[:-1])}")
    return logsumexp(torch.cat(chunks, -1), -1)


@misconception(
    "chunked_logsumexp",
    "The old sum was kept as it was when a larger maximum came. It was measured from the old maximum, "
    "so it has to be scaled before anything is added to it.",
)
def chunked_logsumexp__old_sum_not_rescaled(chunks):
    def merge(one, two):
        top = torch.maximum(one[0], two[0])
        return top, one[1] + two[1] * (two[0] - finite(top)).exp()

    return fold(chunks, pair_of, merge, finished)


@misconception(
    "chunked_logsumexp",
    "Each chunk's sum was added as it came, although it is measured from that chunk's own maximum. "
    "Bring both sums to the same maximum first.",
)
def chunked_logsumexp__sums_with_different_shifts(chunks):
    return fold(chunks, pair_of, lambda one, two: (torch.maximum(one[0], two[0]), one[1] + two[1]), finished)


@misconception(
    "chunked_logsumexp",
    "The maximum of the first chunk served for all. When a later chunk lies far above it the sum "
    "overflows, and when the first chunk lies far above all others or is -inf, other things break.",
)
def chunked_logsumexp__first_maximum_for_all(chunks):
    shift = None

    def summarize(chunk):
        nonlocal shift
        if shift is None:
            shift = finite(pair_of(chunk)[0])
        return (chunk - shift[..., None]).exp().sum(-1)

    return fold(chunks, summarize, lambda one, two: one + two, lambda total: shift + total.log())


@misconception(
    "chunked_logsumexp",
    "Only one number per row was carried, the logsumexp so far. Near 100,000 float32 has steps of "
    "0.008: after some chunks the next one no longer moves it at all. Carry the maximum and the sum "
    "apart.",
)
def chunked_logsumexp__one_number_carried(chunks):
    return fold(
        chunks,
        lambda chunk: logsumexp(chunk, -1),
        lambda one, two: logsumexp(torch.stack([one, two]), 0),
        lambda state: state,
    )


@misconception(
    "chunked_logsumexp",
    "A chunk of -inf made NaN: its maximum is -inf, and -inf minus -inf is not a number.",
)
def chunked_logsumexp__infinite_shift(chunks):
    def summarize(chunk):
        if chunk.shape[-1] == 0:
            return chunk.sum(-1) - INF, chunk.sum(-1)
        top = chunk.amax(-1)
        return top, (chunk - top[..., None]).exp().sum(-1)

    def merge(one, two):
        top = torch.maximum(one[0], two[0])
        return top, one[1] * (one[0] - top).exp() + two[1] * (two[0] - top).exp()

    return fold(chunks, summarize, merge, finished)


@misconception(
    "chunked_logsumexp",
    "A chunk of -inf was remembered with the maximum 0. Sums that really lie near -10,000 are then "
    "measured from 0, and exp(-10,000) is 0.",
)
def chunked_logsumexp__nothing_counts_as_zero(chunks):
    def summarize(chunk):
        top, total = pair_of(chunk)
        return finite(top), total

    return fold(chunks, summarize, merged, finished)


@misconception(
    "chunked_logsumexp",
    "The logsumexps of the chunks were added up. Adding logs multiplies the sums; the sums themselves are to be added.",
)
def chunked_logsumexp__logs_added(chunks):
    return fold(chunks, lambda chunk: logsumexp(chunk, -1), lambda one, two: one + two, lambda state: state)


@misconception(
    "chunked_logsumexp",
    "The largest of the chunks' logsumexps was returned. The smaller ones add to the sum, too.",
)
def chunked_logsumexp__largest_chunk_wins(chunks):
    return fold(chunks, lambda chunk: logsumexp(chunk, -1), torch.maximum, lambda state: state)


@misconception(
    "chunked_logsumexp",
    "One maximum was taken over all rows of a chunk. A row that lies 1000 below it sums to exp(-1000) = 0.",
)
def chunked_logsumexp__one_maximum_for_all_rows(chunks):
    def summarize(chunk):
        if chunk.shape[-1] == 0:
            return chunk.sum(-1) - INF, chunk.sum(-1)
        top = chunk.max().expand(chunk.shape[:-1])
        return top, (chunk - finite(top)[..., None]).exp().sum(-1)

    return fold(chunks, summarize, merged, finished)


@misconception(
    "chunked_logsumexp",
    "The running sum was kept in half precision: in float16 it overflows, and in bfloat16 it stops "
    "growing. Go up to float32 and come back after the last chunk.",
)
def chunked_logsumexp__running_sum_in_half(chunks):
    return fold(chunks, pair_of, merged, finished, up=lambda chunk: chunk)


@misconception(
    "chunked_logsumexp",
    "Everything went through float32, so float64 chunks lost half of their digits. Only half inputs "
    "need another dtype.",
)
def chunked_logsumexp__always_float32(chunks):
    return fold(chunks, pair_of, merged, finished, up=lambda chunk: chunk.float())


@misconception(
    "chunked_logsumexp",
    "Chunks with different leading shapes were merged, because broadcasting stretched the smaller one. "
    "Compare them with the first chunk and name both shapes.",
)
def chunked_logsumexp__rows_stretched(chunks):
    return fold(chunks, pair_of, merged, finished, check=False)
