"""Day 1: tensors are views over storage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def scalar(value: float, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """Return one number as a tensor of shape (): no axes at all.

    `value` is a Python int, float or bool. The tensor has the given dtype, whatever the type of `value`, and
    lives on `device` (None means torch's default device).
    """
    raise NotImplementedError


def counting_table(h: int, w: int, *, start: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Return the int64 tensor (h, w) that counts up from `start`, row by row: out[i, j] = start + i*w + j.

    `start` may be negative. h or w may be 0: the table is then empty, but still has the shape (h, w). It
    lives on `device`.
    """
    raise NotImplementedError


def zero_rows(x: Tensor, keep: Tensor) -> Tensor:
    """Return a copy of x (N, D) in which every row n with keep[n] == False is all zeros.

    keep is a boolean tensor (N,); N may be 0. Kept rows are exactly those of x, dropped rows are exactly 0
    even if they held NaN or infinity. The dtype of x is kept. x itself stays as it was, and the result
    shares no memory with it, also when all rows are kept.

    ValueError with both shapes if keep does not have the shape (N,).
    """
    raise NotImplementedError


def weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """Return (D,): the sum over n of weights[n] * rows[n], for weights (N,) and rows (N, D).

    rows are floating point. weights may have any dtype: integers, booleans or another floating type. The
    result has the dtype of rows. N may be 0: the sum of nothing is zeros.

    ValueError with both shapes if weights does not have the shape (N,).
    """
    raise NotImplementedError


def make_grid(
    h: int, w: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """Return the coordinates (h, w, 2) of a grid: out[i, j] is (i, j).

    h or w may be 0. The result has the given dtype and lives on `device`. Write it without Python loops,
    meshgrid or cartesian_prod. Everything that is allocated on the way, result included, is at most twice
    the result's size.
    """
    raise NotImplementedError


def sequence_mask(lengths: Tensor, max_len: int | None = None) -> Tensor:
    """Return the boolean mask (B, T) whose row b is True at its first lengths[b] places and False after them.

    lengths is an integer tensor (B,), each at least 0. T is max_len, and without it the largest length, or 0
    for an empty batch (B = 0). A max_len below a length cuts the row off, also max_len = 0; one above it
    adds False. The mask lives on the device of lengths. No Python loops.
    """
    raise NotImplementedError


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """Cut the last axis of x (..., T, H*Dh) into H = n_heads equal parts: (..., H, T, Dh).

    Head h holds the features h*Dh to (h+1)*Dh - 1 of every token: out[..., h, t, d] == x[..., t, h*Dh + d].
    Any number of leading axes, also none; any of the sizes may be 0; x need not be contiguous. The result
    is a view of x: not a byte is copied.

    ValueError with the shape of x and n_heads if the last axis does not divide, or if n_heads is below 1.
    """
    raise NotImplementedError


def merge_heads(x: Tensor) -> Tensor:
    """Join the heads of x (..., H, T, Dh) again: (..., T, H*Dh), out[..., t, h*Dh + d] == x[..., h, t, d].

    It undoes split_heads exactly. Any number of leading axes, also none; T may be 0; x need not be
    contiguous. At most one tensor of the size of x is allocated.
    """
    raise NotImplementedError


def gather_last(x: Tensor, lengths: Tensor) -> Tensor:
    """Return the last valid row of each sequence: out[b] = x[b, lengths[b] - 1], (B, D) from x (B, T, D).

    lengths is an int64 tensor (B,), each from 1 to T; B may be 0. x need not be contiguous, any dtype is
    kept. What the other rows hold does not matter, even if it is NaN. The gradient reaches the chosen row
    of each sequence and is zero elsewhere. The result has memory of its own: writing into it leaves x
    alone. No Python loops.

    ValueError with both shapes if lengths does not have the shape (B,).
    """
    raise NotImplementedError


def pad_stack(seqs: list[Tensor], value: float = 0) -> tuple[Tensor, Tensor]:
    """Stack B sequences (Ti, ...) of different lengths into one tensor (B, Tmax, ...), filled up with `value`.

    Returns the stack and the lengths: an int64 tensor (B,). Both live on the device of the sequences, the
    stack has their dtype. Each sequence begins at place 0, the filling follows. Some or all Ti may be 0; there
    may be any number of trailing axes, also none. The sequences stay as they were, and the stack shares no
    memory with them. Beside the stack only a few bytes per sequence are allocated. pad_sequence is not allowed.

    ValueError for an empty list, and with both shapes if two sequences differ in a trailing axis.
    """
    raise NotImplementedError


def sliding_windows(x: Tensor, size: int, step: int = 1) -> Tensor:
    """Return all windows of `size` neighbors along axis 1: (B, N, size, ...) from x (B, T, ...).

    Window n begins at place n*step: out[:, n, i] == x[:, n*step + i]. Only whole windows count, so T < size
    gives N = 0. The result is a view: not a byte is copied, a write into x shows in every window that holds
    the place, and gradients flow back to x. x may be non-contiguous, a slice of something larger, or
    expanded. Tensor.unfold is not allowed.

    ValueError if size or step is below 1.
    """
    raise NotImplementedError


def can_view(shape: Sequence[int], stride: Sequence[int], new_shape: Sequence[int]) -> tuple[int, ...] | None:
    """Return the strides with which a tensor of this shape and stride can be seen as new_shape, or None.

    None means that only a copy could do it: the answer is the one of Tensor.view. Strides count elements,
    and the new order of the elements is the old one, last axis fastest. Strides may be 0 (expanded axes) or
    unusual (transposed and sliced tensors). Where an axis of new_shape has size 1, or the tensor is empty,
    any number will do; there must still be one per axis. Sizes of -1 do not occur. No tensor is needed for
    this, only the integers: view, reshape, as_strided and empty_strided are not allowed.

    ValueError with both shapes if new_shape does not hold as many elements as shape.
    """
    raise NotImplementedError
