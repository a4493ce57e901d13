"""Day 1: tensors are views over storage.

A tensor is a flat storage plus a description of how to walk it: shape, strides (how many elements one step
along an axis moves) and offset. What changes only the description is free; what moves numbers costs memory and
time. The functions below make tensors, pick from them, and cut and join their axes; later days use most of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def scalar(value: float, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """One number as a tensor of shape ()."""
    return torch.tensor(value, dtype=dtype, device=device)


def counting_table(h: int, w: int, *, start: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Integers (h, w) that count up from `start`, row by row."""
    return torch.arange(start, start + h * w, device=device).reshape(h, w)


def zero_rows(x: Tensor, keep: Tensor) -> Tensor:
    """Copy of x (N, D) in which the rows where keep (N,) is False are zero."""
    if keep.shape != x.shape[:1]:
        raise ValueError(f"keep {tuple(keep.shape)} must have one entry per row of x {tuple(x.shape)}")
    out = x.clone()
    out[~keep] = 0
    return out


def weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """Sum (D,) of the rows (N, D), each times its weight (N,), in the dtype of the rows."""
    if weights.shape != rows.shape[:1]:
        raise ValueError(f"weights {tuple(weights.shape)} must have one entry per row of rows {tuple(rows.shape)}")
    return weights.to(rows.dtype) @ rows


def make_grid(
    h: int, w: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """Coordinates (h, w, 2): out[i, j] is (i, j)."""
    rows = torch.arange(h, dtype=dtype, device=device)[:, None].expand(h, w)
    columns = torch.arange(w, dtype=dtype, device=device).expand(h, w)
    return torch.stack((rows, columns), dim=-1)  # (h, w, 2)


def sequence_mask(lengths: Tensor, max_len: int | None = None) -> Tensor:
    """Boolean mask (B, T) that is True at the first lengths[b] places of row b."""
    if max_len is None:
        max_len = max(lengths.tolist(), default=0)
    return torch.arange(max_len, device=lengths.device) < lengths[:, None]


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """View (..., H, T, Dh) of x (..., T, H*Dh)."""
    width = x.shape[-1]
    if n_heads < 1 or width % n_heads != 0:
        raise ValueError(f"the last axis of x {tuple(x.shape)} does not split into {n_heads} heads")
    x = x.unflatten(-1, (n_heads, width // n_heads))  # (..., T, H, Dh)
    return x.transpose(-3, -2)  # (..., H, T, Dh)


def merge_heads(x: Tensor) -> Tensor:
    """Inverse of split_heads: (..., H, T, Dh) -> (..., T, H*Dh)."""
    return x.transpose(-3, -2).flatten(-2)


def gather_last(x: Tensor, lengths: Tensor) -> Tensor:
    """Last valid row of each sequence: x (B, T, D) at lengths[b] - 1, as (B, D)."""
    if lengths.shape != x.shape[:1]:
        raise ValueError(f"lengths {tuple(lengths.shape)} must have one entry per sequence of x {tuple(x.shape)}")
    batch = torch.arange(len(lengths), device=x.device)
    return x[batch, lengths - 1]


def pad_stack(seqs: list[Tensor], value: float = 0) -> tuple[Tensor, Tensor]:
    """Stack (B, Tmax, ...) of sequences (Ti, ...), with `value` behind each, and the lengths (B,)."""
    if not seqs:
        raise ValueError("pad_stack needs at least one sequence")
    first = seqs[0]
    for seq in seqs:
        if seq.shape[1:] != first.shape[1:]:
            raise ValueError(f"sequences differ behind axis 0: {tuple(first.shape)} and {tuple(seq.shape)}")
    lengths = [len(seq) for seq in seqs]
    out = first.new_full((len(seqs), max(lengths), *first.shape[1:]), value)
    for b, seq in enumerate(seqs):
        out[b, : len(seq)] = seq
    return out, torch.tensor(lengths, device=first.device)


def sliding_windows(x: Tensor, size: int, step: int = 1) -> Tensor:
    """View (B, N, size, ...) of x (B, T, ...): window n holds the places n*step to n*step + size - 1."""
    if size < 1 or step < 1:
        raise ValueError(f"size and step must be at least 1, got {size} and {step}")
    B, T, *rest = x.shape
    over_batch, over_time, *over_rest = x.stride()
    n_windows = max(0, (T - size) // step + 1)
    return x.as_strided((B, n_windows, size, *rest), (over_batch, step * over_time, over_time, *over_rest))


def can_view(shape: Sequence[int], stride: Sequence[int], new_shape: Sequence[int]) -> tuple[int, ...] | None:
    """Strides that show a tensor of this shape and stride as `new_shape` without a copy, or None."""
    if prod(shape) != prod(new_shape):
        raise ValueError(f"{tuple(shape)} and {tuple(new_shape)} do not hold the same number of elements")
    if 0 in shape:
        return (0,) * len(new_shape)  # there is nothing to walk over: any strides do

    # Join the old axes, innermost first, into runs that one stride walks through from end to end.
    runs: list[tuple[int, int]] = []  # (length, stride)
    for axis in reversed(range(len(shape))):
        size, step = shape[axis], stride[axis]
        if size == 1:
            continue  # nobody ever steps along this axis
        if runs and step == runs[-1][0] * runs[-1][1]:
            runs[-1] = (runs[-1][0] * size, runs[-1][1])
        else:
            runs.append((size, step))

    # Cut the new axes out of the runs; an axis that would need parts of two runs has no stride.
    new_stride: list[int] = []
    length = covered = step = 1  # the current run, how much of it is cut off already, the next axis' stride
    for size in reversed(new_shape):
        if covered == length and size != 1:
            length, step = runs.pop(0)
            covered = 1
        covered *= size
        if length % covered != 0:
            return None
        new_stride.append(step)
        step *= size
    return tuple(reversed(new_stride))
