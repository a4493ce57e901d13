"""Day 1: right solutions, written differently."""

from itertools import product
from math import prod

import torch

from checker.testing import alternative


@alternative("scalar")
def scalar__full(value, *, dtype=torch.float32, device=None):
    return torch.full((), value, dtype=dtype, device=device)


@alternative("scalar")
def scalar__first_of_a_list(value, *, dtype=torch.float32, device=None):
    return torch.as_tensor([value], dtype=dtype).to(device)[0]


@alternative("counting_table")
def counting_table__broadcast(h, w, *, start=0, device=None):
    return start + w * torch.arange(h, device=device)[:, None] + torch.arange(w, device=device)


@alternative("counting_table")
def counting_table__row_by_row(h, w, *, start=0, device=None):
    out = torch.zeros(h, w, dtype=torch.int64, device=device)
    for i in range(h):
        for j in range(w):
            out[i, j] = start + i * w + j
    return out


@alternative("zero_rows")
def zero_rows__where(x, keep):
    if keep.ndim != 1 or len(keep) != len(x):
        raise ValueError(f"{keep.shape} does not fit {x.shape}")
    return torch.where(keep[:, None], x, 0)


@alternative("zero_rows")
def zero_rows__loop(x, keep):
    if tuple(keep.shape) != (x.size(0),):
        raise ValueError(f"x has shape {tuple(x.shape)}, keep {tuple(keep.shape)}")
    out = torch.zeros_like(x)
    for n in range(len(x)):
        if keep[n]:
            out[n] = x[n]
    return out


@alternative("weighted_sum")
def weighted_sum__einsum(weights, rows):
    if weights.ndim != 1 or len(weights) != len(rows):
        raise ValueError(f"{weights.shape} does not fit {rows.shape}")
    return torch.einsum("n,nd->d", weights.to(rows), rows)


@alternative("weighted_sum")
def weighted_sum__multiply_and_add(weights, rows):
    if weights.ndim != 1 or len(weights) != len(rows):
        raise ValueError(f"{tuple(weights.shape)} does not fit {tuple(rows.shape)}")
    return (weights.unsqueeze(1) * rows).to(rows.dtype).sum(dim=0)


@alternative("make_grid")
def make_grid__written_in(h, w, *, dtype=torch.float32, device=None):
    out = torch.empty(h, w, 2, dtype=dtype, device=device)
    out[..., 0] = torch.arange(h, device=device)[:, None]
    out[..., 1] = torch.arange(w, device=device)
    return out


@alternative("make_grid")
def make_grid__broadcast_tensors(h, w, *, dtype=torch.float32, device=None):
    rows, columns = torch.arange(h, dtype=dtype).view(h, 1), torch.arange(w, dtype=dtype).view(1, w)
    return torch.stack(torch.broadcast_tensors(rows, columns), 2).to(device)


@alternative("sequence_mask")
def sequence_mask__count(lengths, max_len=None):
    if max_len is None:
        max_len = int(lengths.max()) if lengths.numel() else 0
    ones = torch.ones(len(lengths), max_len, dtype=torch.int64, device=lengths.device)
    return ones.cumsum(1) <= lengths[:, None]


@alternative("sequence_mask")
def sequence_mask__compare(lengths, max_len=None):
    if max_len is None:
        max_len = 0 if len(lengths) == 0 else lengths.amax().item()
    places = torch.arange(max_len).to(lengths.device)
    return lengths.unsqueeze(1).gt(places.unsqueeze(0))


@alternative("split_heads")
def split_heads__movedim(x, n_heads):
    if n_heads <= 0 or x.size(-1) % n_heads:
        raise ValueError(f"cannot cut {x.shape} into {n_heads} heads")
    return x.reshape(*x.shape[:-1], n_heads, x.size(-1) // n_heads).movedim(-2, -3)


@alternative("split_heads")
def split_heads__strides(x, n_heads):
    *lead, T, width = x.shape
    if n_heads <= 0 or width % n_heads:
        raise ValueError(f"cannot cut {(*lead, T, width)} into {n_heads} heads")
    *over_lead, over_time, over_width = x.stride()
    size = width // n_heads
    return x.as_strided((*lead, n_heads, T, size), (*over_lead, size * over_width, over_time, over_width))


@alternative("merge_heads")
def merge_heads__cat(x):
    return torch.cat(x.unbind(-3), dim=-1)


@alternative("merge_heads")
def merge_heads__permute(x):
    *lead, H, T, Dh = x.shape
    return x.movedim(-3, -2).contiguous().view(*lead, T, H * Dh)


@alternative("gather_last")
def gather_last__gather(x, lengths):
    if lengths.ndim != 1 or len(lengths) != len(x):
        raise ValueError(f"{lengths.shape} does not fit {x.shape}")
    index = (lengths - 1)[:, None, None].expand(-1, 1, x.size(2))
    return x.gather(1, index).squeeze(1)


@alternative("gather_last")
def gather_last__boolean(x, lengths):
    if lengths.ndim != 1 or len(lengths) != len(x):
        raise ValueError(f"{tuple(lengths.shape)} does not fit {tuple(x.shape)}")
    return x[torch.arange(x.size(1), device=x.device) == lengths[:, None] - 1]


@alternative("pad_stack")
def pad_stack__full(seqs, value=0):
    if len(seqs) == 0:
        raise ValueError("no sequences")
    shapes = [tuple(seq.shape) for seq in seqs]
    if len({shape[1:] for shape in shapes}) > 1:
        raise ValueError(f"shapes do not fit: {shapes}")
    lengths = torch.tensor([shape[0] for shape in shapes], device=seqs[0].device)
    size = (len(seqs), max(shape[0] for shape in shapes), *shapes[0][1:])
    out = torch.full(size, value, dtype=seqs[0].dtype, device=seqs[0].device)
    for b, seq in enumerate(seqs):
        out[b, : seq.shape[0]] = seq
    return out, lengths


@alternative("pad_stack")
def pad_stack__narrow(seqs, value=0):
    if not seqs:
        raise ValueError("no sequences")
    for seq in seqs[1:]:
        if seq.shape[1:] != seqs[0].shape[1:]:
            raise ValueError(f"{seq.shape} does not fit {seqs[0].shape}")
    longest = max(seq.size(0) for seq in seqs)
    out = torch.empty(len(seqs), longest, *seqs[0].shape[1:], dtype=seqs[0].dtype, device=seqs[0].device)
    for b, seq in enumerate(seqs):
        out[b].narrow(0, 0, seq.size(0)).copy_(seq)
        out[b, seq.size(0) :].fill_(value)
    return out, torch.tensor([seq.size(0) for seq in seqs], dtype=torch.int64, device=seqs[0].device)


@alternative("sliding_windows")
def sliding_windows__function(x, size, step=1):
    if size <= 0 or step <= 0:
        raise ValueError("size and step count from 1")
    n = len(range(0, x.size(1) - size + 1, step))
    shape = (x.size(0), n, size) + tuple(x.shape[2:])
    stride = (x.stride(0), x.stride(1) * step) + tuple(x.stride()[1:])
    return torch.as_strided(x, shape, stride, x.storage_offset())


@alternative("can_view")
def can_view__addresses(shape, stride, new_shape):
    """Guess the strides from the addresses of a few elements, then look at every one."""
    if prod(shape) != prod(new_shape):
        raise ValueError(f"{tuple(shape)} is not {tuple(new_shape)}")

    def addresses(sizes, steps):
        return [sum(i * s for i, s in zip(place, steps, strict=True)) for place in product(*map(range, sizes))]

    old = addresses(shape, stride)
    guess = []
    for axis, size in enumerate(new_shape):
        guess.append(old[prod(new_shape[axis + 1 :])] if size > 1 and old else 1)
    return tuple(guess) if addresses(new_shape, guess) == old else None
