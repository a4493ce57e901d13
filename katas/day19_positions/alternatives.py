"""Day 19: right solutions, written differently."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from checker.testing import alternative

# sinusoidal


@alternative("sinusoidal")
def sinusoidal__filled_columns(positions, dim, base=10000.0):
    if dim % 2:
        raise ValueError(f"dim must be even, not {dim}")
    exponent = torch.arange(0, dim, 2, device=positions.device).double() / dim
    angles = torch.einsum("...,i->...i", positions.double(), torch.exp(-math.log(base) * exponent))
    out = torch.empty(*positions.shape, dim, dtype=torch.float64, device=positions.device)
    out[..., 0::2] = torch.sin(angles)
    out[..., 1::2] = torch.cos(angles)
    return out if positions.dtype == torch.float64 else out.float()


@alternative("sinusoidal")
def sinusoidal__shifted_sines(positions, dim, base=10000.0):
    if dim % 2 == 1:
        raise ValueError(f"odd: {dim}")
    column = torch.arange(dim, device=positions.device)
    w = torch.tensor(float(base), dtype=torch.float64, device=positions.device) ** (-2.0 * (column // 2).double() / dim)
    angles = positions.unsqueeze(-1).to(torch.float64) * w
    table = torch.where(column % 2 == 0, angles.sin(), angles.cos())
    return table.to(torch.float64 if positions.dtype == torch.float64 else torch.float32)


# LearnedPositions


@alternative("LearnedPositions")
class LearnedPositions__embedding(nn.Module):
    def __init__(self, max_len, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_len, dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x, *, offset=0):
        max_len, dim = self.weight.shape
        if x.size(-1) != dim:
            raise ValueError(f"{x.shape} does not fit {self.weight.shape}")
        places = torch.arange(offset, offset + x.size(-2), device=x.device)
        if offset < 0 or (len(places) and offset + len(places) > max_len):
            raise IndexError("no such position")
        return torch.add(F.embedding(places, self.weight), x).type(x.dtype)


@alternative("LearnedPositions")
class LearnedPositions__narrow(nn.Module):
    def __init__(self, max_len, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.normal(0.0, 0.02, (max_len, dim)))

    def forward(self, x, *, offset=0):
        if x.shape[-1] != self.weight.shape[-1]:
            raise ValueError(f"widths differ: {tuple(x.shape)}, {tuple(self.weight.shape)}")
        if not 0 <= offset <= len(self.weight) - x.shape[-2]:
            raise IndexError(f"{offset} is out of range")
        return (self.weight.narrow(0, offset, x.shape[-2]).expand(x.shape) + x).to(x.dtype)


# rope_tables


@alternative("rope_tables")
def rope_tables__float32_angles(positions, dim, base=10000.0, *, inv_freq=None):
    if dim % 2:
        raise ValueError(f"dim is {dim}")
    wide = torch.float64 if positions.dtype == torch.float64 else torch.float32
    if inv_freq is None:
        inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=wide, device=positions.device) / dim))
    if tuple(inv_freq.shape) != (dim // 2,):
        raise ValueError(f"{inv_freq.shape} does not fit dim={dim}")
    angles = torch.einsum("...,i->...i", positions.to(wide), inv_freq.to(wide))
    return torch.cos(angles), torch.sin(angles)


@alternative("rope_tables")
def rope_tables__polar(positions, dim, base=10000.0, *, inv_freq=None):
    if dim % 2:
        raise ValueError(f"dim is {dim}")
    if inv_freq is None:
        inv_freq = torch.exp(-math.log(base) * torch.arange(dim // 2, device=positions.device).double() * 2 / dim)
    if inv_freq.ndim != 1 or len(inv_freq) * 2 != dim:
        raise ValueError(f"{inv_freq.shape} does not fit dim={dim}")
    angles = positions.double().unsqueeze(-1) * inv_freq.double()
    turns = torch.exp(1j * angles)
    wide = torch.float64 if positions.dtype == torch.float64 else torch.float32
    return turns.real.to(wide), turns.imag.to(wide)


# apply_rope


def _tables_for(x, cos, sin):
    if cos.shape != sin.shape:
        raise ValueError(f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}")
    ok = cos.dim() <= x.dim() and cos.shape[-2] == x.shape[-2] and 2 * cos.shape[-1] == x.shape[-1]
    for have, want in zip(cos.shape[:-2], x.shape[:-2], strict=False):
        ok = ok and have in (1, want)
    if not ok:
        raise ValueError(f"x {tuple(x.shape)}, tables {tuple(cos.shape)}")
    while cos.dim() < x.dim():
        cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    return cos, sin


@alternative("apply_rope")
def apply_rope__complex(x, cos, sin):
    cos, sin = _tables_for(x, cos, sin)
    wide = torch.promote_types(x.dtype, cos.dtype)
    z = torch.view_as_complex(x.to(wide).reshape(*x.shape[:-1], x.shape[-1] // 2, 2).contiguous())
    turned = torch.view_as_real(z * torch.complex(cos.to(wide), sin.to(wide)))
    return turned.reshape(x.shape).to(x.dtype)


@alternative("apply_rope")
def apply_rope__repeated_tables(x, cos, sin):
    cos, sin = (table.repeat_interleave(2, -1) for table in _tables_for(x, cos, sin))
    swapped = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).reshape(x.shape)
    return (x * cos + swapped * sin).to(x.dtype)


# rotary_attention


@alternative("rotary_attention")
def rotary_attention__by_hand(q, k, v, query_positions, key_positions, base=10000.0):
    def turn(x, positions):
        i = torch.arange(x.shape[-1] // 2, device=x.device, dtype=torch.float64)
        angles = positions.double().unsqueeze(-1) * base ** (-2 * i / x.shape[-1])
        if positions.shape[-1] != x.shape[-2]:
            raise ValueError(f"{tuple(positions.shape)} are not the positions of {tuple(x.shape)}")
        if angles.dim() == 3:
            angles = angles.unsqueeze(1)
        z = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(z * torch.exp(1j * angles)).flatten(-2)

    scores = torch.einsum("bhtd,bhsd->bhts", turn(q, query_positions), turn(k, key_positions)) / q.shape[-1] ** 0.5
    future = key_positions.unsqueeze(-2) > query_positions.unsqueeze(-1)
    future = future if future.dim() == 2 else future.unsqueeze(1)
    weights = torch.softmax(scores.masked_fill(future, -1e300), -1).masked_fill(future, 0.0)
    return (weights @ v.double()).to(q.dtype)


# half_layout


@alternative("apply_rope_half")
def apply_rope_half__swapped_halves(x, cos, sin):
    cos, sin = (torch.cat((table, table), -1) for table in _tables_for(x, cos, sin))
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), -1)
    return (x * cos + rotated * sin).to(x.dtype)


@alternative("apply_rope_half")
def apply_rope_half__complex(x, cos, sin):
    cos, sin = _tables_for(x, cos, sin)
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).tensor_split(2, -1)
    z = torch.complex(first, second) * torch.complex(cos, sin).to(torch.promote_types(x.dtype, cos.dtype).to_complex())
    return torch.cat((z.real, z.imag), -1).to(x.dtype)


@alternative("interleaved_to_half")
def interleaved_to_half__by_index(w, n_heads):
    rows = len(w)
    if rows % n_heads or (rows // n_heads) % 2:
        raise ValueError(f"{tuple(w.shape)}: {rows} rows are not pairs for {n_heads} heads")
    width = rows // n_heads
    order = [h * width + i for h in range(n_heads) for i in [*range(0, width, 2), *range(1, width, 2)]]
    return w[torch.tensor(order, device=w.device)]


@alternative("interleaved_to_half")
def interleaved_to_half__head_by_head(w, n_heads):
    if w.size(0) % n_heads != 0 or w.size(0) // n_heads % 2 != 0:
        raise ValueError(f"{w.shape} and {n_heads} heads")
    return torch.cat([part for head in w.chunk(n_heads) for part in (head[::2], head[1::2])])


# alibi_bias


@alternative("alibi_bias")
def alibi_bias__slopes_as_published(n_heads, tq, tk, *, offset=None, device=None):
    def power_of_two(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    closest = 2 ** math.floor(math.log2(n_heads))
    slopes = power_of_two(closest)
    if closest < n_heads:
        slopes += power_of_two(2 * closest)[0::2][: n_heads - closest]
    place = torch.arange(tq, device=device) + (tk - tq if offset is None else offset)
    steps = (torch.arange(tk, device=device).unsqueeze(0) - place.unsqueeze(1)).abs().float()
    return torch.einsum("h,qk->hqk", torch.tensor(slopes, device=device, dtype=torch.float32), steps).neg()


# relative_bucket and relative_bias


@alternative("relative_bucket")
def relative_bucket__float32_as_published(rel, num_buckets=32, max_distance=128, bidirectional=True):
    buckets = torch.zeros_like(rel)
    if bidirectional:
        num_buckets = num_buckets // 2
        buckets = buckets + (rel > 0).to(torch.long) * num_buckets
        rel = torch.abs(rel)
    else:
        rel = -torch.min(rel, torch.zeros_like(rel))
    exact = num_buckets // 2
    large = exact + (
        torch.log(rel.float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    ).nan_to_num(neginf=0.0).to(torch.long)
    large = torch.min(large, torch.full_like(large, num_buckets - 1))
    return buckets + torch.where(rel < exact, rel, large)


@alternative("relative_bucket")
def relative_bucket__numpy(rel, num_buckets=32, max_distance=128, bidirectional=True):
    r = rel.cpu().numpy()
    n = num_buckets // 2 if bidirectional else num_buckets
    d = np.abs(r) if bidirectional else np.maximum(-r, 0)
    e = n // 2
    far = e + np.floor(np.log(np.maximum(d, e) / e) / np.log(max_distance / e) * (n - e))
    bucket = np.where(d < e, d, np.minimum(far, n - 1)) + (n * (r > 0) if bidirectional else 0)
    return torch.from_numpy(np.asarray(bucket)).long().to(rel.device)


@alternative("RelativeBias")
class RelativeBias__embedding(nn.Module):
    def __init__(self, n_heads, num_buckets=32, max_distance=128, bidirectional=True):
        super().__init__()
        self.how = (num_buckets, max_distance, bidirectional)
        self.weight = nn.Parameter(torch.zeros(num_buckets, n_heads))

    def forward(self, query_positions, key_positions):
        rel = key_positions.unsqueeze(-2) - query_positions.unsqueeze(-1)
        bias = F.embedding(relative_bucket__float32_as_published(rel, *self.how), self.weight)
        return bias.transpose(-1, -2).transpose(-2, -3)


# ntk_base


@alternative("ntk_base")
def ntk_base__solved(base, dim, factor):
    if dim % 2 == 1 or dim <= 2:
        raise ValueError(f"dim={dim}")
    slowest = base ** (-(dim - 2) / dim)
    return float((slowest / factor) ** (-dim / (dim - 2)))


@alternative("local_resolution")
def local_resolution__complex(dim, base=10000.0, *, interpolation=1.0):
    w = [base ** (-2 * i / dim) / interpolation for i in range(dim // 2)]
    return sum(abs(complex(math.cos(a) - 1, math.sin(a))) for a in w) / len(w)
