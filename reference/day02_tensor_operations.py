"""Broadcasting and reductions that stay finite.

Six small functions that later days stand on, two warm-ups before them and one preview after them.
The shift by the maximum in `logsumexp` and `softmax` is analyzed in Blanchard, Higham and Higham,
"Accurately computing the log-sum-exp and softmax functions", IMA J. Numer. Anal. 41 (2021), section 1.
The merging in `chunked_logsumexp` is section 3.1 of Milakov and Gimelshein, "Online normalizer calculation
for softmax" (arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest

import torch
from torch import Tensor


def broadcast_shape(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that two tensors of shapes `a` and `b` have together."""
    sizes = []
    for m, n in zip_longest(reversed(a), reversed(b), fillvalue=1):
        if m != n and 1 not in (m, n):
            raise ValueError(f"shapes {tuple(a)} and {tuple(b)} do not broadcast")
        sizes.append(n if m == 1 else m)
    return tuple(reversed(sizes))


def column_mse(pred: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference of each column, (N, D) and (N, D) -> (D,)."""
    if pred.shape != target.shape:
        raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)} differ in shape")
    return (pred - target).square().mean(dim=0)  # (D,)


def standardize(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Shift and scale the last axis to mean zero and biased variance one."""
    wide = _at_least_float32(x)
    centered = wide - wide.mean(dim=-1, keepdim=True)  # (..., D)
    variance = centered.square().mean(dim=-1, keepdim=True)  # (..., 1)
    return (centered / (variance + eps).sqrt()).to(x.dtype)


def logsumexp(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """Return log(sum(exp(x))) over one axis, for entries of any size."""
    if x.shape[dim] == 0:
        return x.sum(dim, keepdim=keepdim).log()  # the log of an empty sum
    wide = _at_least_float32(x)
    top = wide.amax(dim, keepdim=True)
    shift = _finite_or_zero(top)
    result = shift + (wide - shift).exp().sum(dim, keepdim=True).log()
    return (result if keepdim else result.squeeze(dim)).to(x.dtype)


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Return exp(x) / sum(exp(x)) over one axis, for entries of any size."""
    if x.dim() == 0:
        raise ValueError("softmax needs an axis to sum over, but x has shape ()")
    if x.shape[dim] == 0:
        return torch.empty_like(x)
    wide = _at_least_float32(x)
    weights = (wide - wide.amax(dim, keepdim=True)).exp()
    return (weights / weights.sum(dim, keepdim=True)).to(x.dtype)


def masked_softmax(x: Tensor, mask: Tensor | None, dim: int = -1) -> Tensor:
    """Return the softmax over the entries where `mask` is True, and zeros elsewhere."""
    if mask is None:
        return softmax(x, dim)
    mask = _expand_mask(mask, x)
    nothing_kept = ~mask.any(dim, keepdim=True)
    scores = x.masked_fill(~mask, -torch.inf).masked_fill(nothing_kept, 0.0)  # a harmless row, for backward
    return softmax(scores, dim).masked_fill(~mask, 0.0)


def masked_mean(
    x: Tensor, mask: Tensor | None, dim: int | tuple[int, ...] | None = None, keepdim: bool = False
) -> Tensor:
    """Return the mean of the entries where `mask` is True, and 0 where there is none."""
    if mask is None:
        mask = x.new_ones((), dtype=torch.bool)
    mask = _expand_mask(mask, x)
    total = _at_least_float32(x).masked_fill(~mask, 0.0).sum(dim, keepdim=keepdim)
    count = mask.sum(dim, keepdim=keepdim)
    return (total / count.clamp(min=1)).to(x.dtype)


def pairwise_sq_dist(a: Tensor, b: Tensor) -> Tensor:
    """Return all squared Euclidean distances, (N, D) and (M, D) -> (N, M)."""
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} hold points of different widths")
    u, v = _at_least_float32(a), _at_least_float32(b)
    squares = u.square().sum(1)[:, None] + v.square().sum(1)  # (N, M)
    return (squares - 2 * (u @ v.T)).clamp(min=0).to(a.dtype)  # (N, M)


def chunked_logsumexp(chunks: Iterable[Tensor]) -> Tensor:
    """Return logsumexp over the last axis of all chunks, of which one is held at a time.

    What is carried is the pair (top, total), which stands for total * exp(top). Two pairs merge into one,
    in any grouping, and (-inf, 0) changes nothing.
    """
    state = None
    for chunk in chunks:
        pair = _summarize(_at_least_float32(chunk))
        if state is None:
            rows, dtype, state = chunk.shape[:-1], chunk.dtype, pair
        elif chunk.shape[:-1] == rows:
            state = _merge(state, pair)
        else:
            raise ValueError(f"a chunk of rows {tuple(chunk.shape[:-1])} follows chunks of rows {tuple(rows)}")
    if state is None:
        raise ValueError("no chunk came, so the shape of the result is unknown")
    top, total = state
    return (top + total.log()).to(dtype)


def _summarize(chunk: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pair (top, total) of one chunk."""
    if chunk.shape[-1] == 0:
        total = chunk.sum(-1)
        return total - torch.inf, total
    top = chunk.amax(-1)
    return top, (chunk - _finite_or_zero(top)[..., None]).exp().sum(-1)


def _merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the pair that stands for the sum of what two pairs stand for."""
    (top_a, total_a), (top_b, total_b) = a, b
    top = torch.maximum(top_a, top_b)
    shift = _finite_or_zero(top)
    return top, total_a * (top_a - shift).exp() + total_b * (top_b - shift).exp()


def _finite_or_zero(top: Tensor) -> Tensor:
    """Return a maximum that may be subtracted: inf - inf would be NaN."""
    return torch.where(top.isfinite(), top, 0.0)


def _at_least_float32(x: Tensor) -> Tensor:
    """Return half inputs in float32 and everything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _expand_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Return `mask` as a view of x's shape, or raise if it does not broadcast to it."""
    if broadcast_shape(tuple(mask.shape), tuple(x.shape)) != tuple(x.shape):
        raise ValueError(f"mask {tuple(mask.shape)} does not broadcast to x {tuple(x.shape)}")
    return mask.expand(x.shape)
