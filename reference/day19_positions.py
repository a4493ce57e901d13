"""Where a token stands: sinusoids, learned rows, rotary embeddings, and two biases that look at distances.

The sinusoids are section 3.5 of Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762). Rotary embeddings
are section 3.4.2 of Su et al., "RoFormer" (arXiv 2104.09864). The biases come from Press et al., "Train Short, Test
Long" (ALiBi, arXiv 2108.12409, section 3) and from Raffel et al., "T5" (arXiv 1910.10683, section 2.1). The stretch
is what became known as NTK-aware scaling, section 3.1 of Peng et al., "YaRN" (arXiv 2309.00071).
Rotary pairs are neighbors, (x0, x1), (x2, x3), ...; the half-split layout appears once, as a conversion.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from reference.day16_scaled_dot_product import attention


def sinusoidal(positions: Tensor, dim: int, base: float = 10000.0) -> Tensor:
    """Return (..., dim): sin(p * w_i) in column 2i and cos(p * w_i) in column 2i + 1, with w_i = base ** (-2i / dim)."""
    angles = positions[..., None] * _frequencies(dim, base, positions.device)  # (..., dim/2)
    table = torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)  # (..., dim)
    return table.to(_table_dtype(positions))


class LearnedPositions(nn.Module):
    """One trained row per position, `weight` (max_len, dim), added to what stands there."""

    def __init__(self, max_len: int, dim: int):
        """Draw the rows from a normal distribution with standard deviation 0.02."""
        super().__init__()
        self.weight = nn.Parameter(torch.randn(max_len, dim) * 0.02)

    def forward(self, x: Tensor, *, offset: int = 0) -> Tensor:
        """Add the rows offset, offset + 1, ... to x (..., T, dim)."""
        *_, T, D = x.shape
        max_len, dim = self.weight.shape
        if D != dim:
            raise ValueError(f"x {tuple(x.shape)} and the rows {tuple(self.weight.shape)} differ in their last axis")
        if offset < 0 or offset + T > max_len:
            raise IndexError(f"positions {offset} to {offset + T - 1} were asked for, but there are {max_len}")
        return (x + self.weight[offset : offset + T]).to(x.dtype)


def rope_tables(
    positions: Tensor, dim: int, base: float = 10000.0, *, inv_freq: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each (..., dim/2): the rotation of every pair at every position."""
    if inv_freq is None:
        inv_freq = _frequencies(dim, base, positions.device)
    elif inv_freq.shape != (dim / 2,):
        raise ValueError(f"inv_freq {tuple(inv_freq.shape)} has not one frequency for each pair of dim {dim}")
    dtype = _table_dtype(positions)
    angles = positions[..., None].to(dtype) * inv_freq.to(dtype)  # (..., dim/2)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), ... of x (..., T, D) by the angles of the tables."""
    cos, sin = _aligned(x, cos, sin)
    even, odd = x[..., 0::2], x[..., 1::2]  # (..., T, D/2)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)  # (..., T, D/2, 2)
    return rotated.flatten(-2).to(x.dtype)


def rotary_attention(
    q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor, key_positions: Tensor, base: float = 10000.0
) -> Tensor:
    """Return causal attention in which q and k are rotated by where they stand; no key of the future is seen."""
    D = q.shape[-1]
    q = apply_rope(q, *rope_tables(query_positions, D, base))
    k = apply_rope(k, *rope_tables(key_positions, D, base))
    mask = key_positions[..., None, None, :] <= query_positions[..., None, :, None]  # (..., 1, T, S)
    out, _ = attention(q, k, v, mask)
    return out


def apply_rope_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x0, x_{D/2}), (x1, x_{D/2+1}), ... of x (..., T, D) by the angles of the tables."""
    cos, sin = _aligned(x, cos, sin)
    first, second = x.chunk(2, -1)  # (..., T, D/2)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1).to(x.dtype)


def interleaved_to_half(w: Tensor, n_heads: int) -> Tensor:
    """Return w (H*D, ...) with the rows of each head in the order 0, 2, 4, ..., 1, 3, 5, ..."""
    if w.shape[0] % (2 * n_heads):
        raise ValueError(f"{tuple(w.shape)} has no whole pairs of rows for each of {n_heads} heads")
    pairs = w.unflatten(0, (n_heads, -1, 2))  # (H, D/2, 2, ...)
    return pairs.transpose(1, 2).flatten(0, 2)  # (H*D, ...)


def alibi_bias(
    n_heads: int, tq: int, tk: int, *, offset: int | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Return (H, tq, tk): minus the slope of the head times the distance between query and key."""
    if offset is None:
        offset = tk - tq  # the last query is the newest
    query = torch.arange(tq, device=device)[:, None] + offset  # (tq, 1)
    distance = (query - torch.arange(tk, device=device)).abs()  # (tq, tk)
    slopes = torch.tensor(_alibi_slopes(n_heads), dtype=torch.float32, device=device)  # (H,)
    return -slopes[:, None, None] * distance


def relative_bucket(rel: Tensor, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True) -> Tensor:
    """Return the bucket of each rel = key position - query position: exact when near, logarithmic when far."""
    if bidirectional:
        num_buckets //= 2  # the upper half is for keys that come later
        distance, first = rel.abs(), (rel > 0) * num_buckets
    else:
        distance, first = -rel.clamp(max=0), 0
    exact = num_buckets // 2
    ratio = distance.clamp(min=exact).double() / exact  # at least 1
    steps = ratio.log2() / math.log2(max_distance / exact) * (num_buckets - exact)
    far = (exact + steps.long()).clamp(max=num_buckets - 1)
    return first + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """One trained number per bucket and head, `weight` (num_buckets, n_heads), to be added to the scores."""

    def __init__(self, n_heads: int, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True):
        """Begin without a bias: the weight is zeros."""
        super().__init__()
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.weight = nn.Parameter(torch.zeros(num_buckets, n_heads))

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Return (..., H, T, S) for query positions (..., T) and key positions (..., S)."""
        rel = key_positions[..., None, :] - query_positions[..., :, None]  # (..., T, S)
        bucket = relative_bucket(rel, len(self.weight), self.max_distance, self.bidirectional)
        return self.weight[bucket].movedim(-1, -3)  # (..., H, T, S)


def ntk_base(base: float, dim: int, factor: float) -> float:
    """Return the base whose lowest frequency is `factor` times lower, while the highest stays 1."""
    if dim % 2 or dim < 4:
        raise ValueError(
            f"dim {dim} has not two or more pairs: the highest frequency cannot stay while the lowest goes"
        )
    return base * factor ** (dim / (dim - 2))


def local_resolution(dim: int, base: float = 10000.0, *, interpolation: float = 1.0) -> float:
    """Return how far a step of one position moves a pair of length 1, averaged over the pairs."""
    angles = _frequencies(dim, base, torch.device("cpu")) / interpolation  # (dim/2,)
    return (2 * (angles / 2).sin().abs()).mean().item()  # the chord of an angle


def _frequencies(dim: int, base: float, device: torch.device) -> Tensor:
    """Return base ** (-2i / dim) for i < dim / 2, in float64."""
    if dim % 2:
        raise ValueError(f"dim {dim} is odd: a pair has two columns")
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)  # (dim/2,)


def _table_dtype(positions: Tensor) -> torch.dtype:
    """Return float64 for float64 positions and float32 for all others."""
    return torch.float64 if positions.dtype == torch.float64 else torch.float32


def _aligned(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return tables that broadcast to x: axes of x that they lack stand before T, with size 1."""
    *lead, T, D = x.shape
    rows = cos.shape[:-2]  # (), or (B,) for a position of its own in each row of the batch
    missing = len(lead) - len(rows)
    if cos.shape != sin.shape:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} differ")
    matching = all(n in (1, m) for n, m in zip(rows, lead, strict=False))
    if missing < 0 or cos.shape[-2:] != (T, D / 2) or not matching:
        raise ValueError(f"tables {tuple(cos.shape)} do not fit x {tuple(x.shape)}: {T} positions, {D}/2 pairs")
    shape = (*rows, *[1] * missing, T, D // 2)
    return cos.reshape(shape), sin.reshape(shape)


def _alibi_slopes(n_heads: int) -> list[float]:
    """Return 2 ** (-8h / n) for h = 1 ... n heads; what exceeds a power of two fills the gaps from the front."""
    n = 2 ** int(math.log2(n_heads))
    return [2 ** (-8 * h / n) for h in range(1, n + 1)] + [2 ** (-8 * (h - 0.5) / n) for h in range(1, n_heads - n + 1)]
