"""The pieces of multi-head latent attention, with the names and layouts of DeepSeek's checkpoints.

DeepSeek-V2 (arXiv:2405.04434), section 2.1 and appendix C, equations 37 to 47: a latent c for all keys and values, one
rotated key beside it that all heads share, and queries that may go through a latent of their own. Section 3.1.2 adds
an RMSNorm after each latent. What a cache keeps is the normalized latent and the rotated key. The stretch follows the
656-byte record of DeepSeek's sparse kernels (FlashMLA), with 8-bit integers in place of 8-bit floats.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reference.day01_tensor_basics import split_heads
from reference.day08_linear_layers import Linear
from reference.day14_custom_modules import RMSNorm
from reference.day19_positions import apply_rope

LEVELS = 127  # codes run from -127 to 127


def mla_parameter_count(
    d_model: int, n_heads: int, dn: int, dr: int, dv: int, r: int, rq: int | None = None
) -> dict[str, int]:
    """Return the number of parameters of each part of one attention layer, and their total."""
    q_out = n_heads * (dn + dr)
    if rq is None:
        counts = {"q_proj": q_out * d_model}
    else:
        counts = {"q_a_proj": rq * d_model, "q_a_layernorm": rq, "q_b_proj": q_out * rq}
    counts |= {
        "kv_a_proj_with_mqa": (r + dr) * d_model,
        "kv_a_layernorm": r,
        "kv_b_proj": n_heads * (dn + dv) * r,
        "o_proj": d_model * n_heads * dv,
    }
    return counts | {"total": sum(counts.values())}


class KVDown(nn.Module):
    """From x to what is cached: the normalized latent of keys and values, and the rotated key of all heads."""

    def __init__(self, d_model: int, r: int, dr: int, eps: float = 1e-6):
        super().__init__()
        self.r, self.dr = r, dr
        self.kv_a_proj_with_mqa = Linear(d_model, r + dr, bias=False)
        self.kv_a_layernorm = RMSNorm(r, eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (B, T, D) to c (B, T, r) and k_rope (B, T, dr)."""
        latent, key = self.kv_a_proj_with_mqa(x).split((self.r, self.dr), -1)  # (B, T, r), (B, T, dr)
        return self.kv_a_layernorm(latent), apply_rope(key, cos, sin)


def split_kv_b(weight: Tensor, n_heads: int, dn: int, dv: int) -> tuple[Tensor, Tensor]:
    """Return views w_uk (H, dn, r) and w_uv (H, dv, r) of kv_b_proj.weight (H*(dn+dv), r)."""
    if weight.shape[0] != n_heads * (dn + dv):
        raise ValueError(f"weight {tuple(weight.shape)} has not {n_heads * (dn + dv)} rows: {n_heads} x ({dn} + {dv})")
    return weight.unflatten(0, (n_heads, dn + dv)).split((dn, dv), 1)  # (H, dn, r), (H, dv, r)


class KVUp(nn.Module):
    """From the latent to the keys (without their rotary part) and the values of all heads."""

    def __init__(self, r: int, n_heads: int, dn: int, dv: int):
        super().__init__()
        self.n_heads, self.dn, self.dv = n_heads, dn, dv
        self.kv_b_proj = Linear(r, n_heads * (dn + dv), bias=False)

    def forward(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Map c (B, S, r) to k_nope (B, H, S, dn) and v (B, H, S, dv)."""
        heads = split_heads(self.kv_b_proj(c), self.n_heads)  # (B, H, S, dn+dv)
        return heads.split((self.dn, self.dv), -1)


class QueryPath(nn.Module):
    """From x to the two parts of the queries, straight or through a normalized latent of width rq."""

    def __init__(self, d_model: int, n_heads: int, dn: int, dr: int, rq: int | None = None, eps: float = 1e-6):
        super().__init__()
        self.n_heads, self.dn, self.dr, self.rq = n_heads, dn, dr, rq
        q_out = n_heads * (dn + dr)
        if rq is None:
            self.q_proj = Linear(d_model, q_out, bias=False)
        else:
            self.q_a_proj = Linear(d_model, rq, bias=False)
            self.q_a_layernorm = RMSNorm(rq, eps)
            self.q_b_proj = Linear(rq, q_out, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (B, T, D) to q_nope (B, H, T, dn) and the rotated q_rope (B, H, T, dr)."""
        q = self.q_proj(x) if self.rq is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = split_heads(q, self.n_heads).split((self.dn, self.dr), -1)  # (B, H, T, dn), (B, H, T, dr)
        return q_nope, apply_rope(q_rope, cos, sin)


def decoupled_scores(
    q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, scale: float | None = None
) -> Tensor:
    """Return (B, H, T, S): the products of [q_nope, q_rope] with [k_nope, k_rope], where all heads share k_rope."""
    if q_nope.shape[:3] != q_rope.shape[:3]:
        raise ValueError(f"q_nope {tuple(q_nope.shape)} does not fit q_rope {tuple(q_rope.shape)}")
    if q_nope.shape[:2] != k_nope.shape[:2] or q_nope.shape[3] != k_nope.shape[3]:
        raise ValueError(f"q_nope {tuple(q_nope.shape)} does not fit k_nope {tuple(k_nope.shape)}")
    if q_rope.shape[3] != k_rope.shape[-1]:
        raise ValueError(f"q_rope {tuple(q_rope.shape)} does not fit k_rope {tuple(k_rope.shape)}")
    if k_nope.shape[::2] != k_rope.shape[:-1]:
        raise ValueError(f"k_nope {tuple(k_nope.shape)} does not fit k_rope {tuple(k_rope.shape)}")
    if scale is None:
        scale = (q_nope.shape[3] + q_rope.shape[3]) ** -0.5
    scores = q_nope @ k_nope.mT  # (B, H, T, S)
    scores += torch.einsum("bhtd,bsd->bhts", q_rope, k_rope)  # (B, H, T, S): one key for all heads
    return scores.mul_(scale)


class LatentCache:
    """Latents and rotated keys of up to max_len positions in two buffers that are allocated once: no head axis."""

    def __init__(
        self,
        batch: int,
        max_len: int,
        r: int,
        dr: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        self.max_len = max_len
        self.latents = torch.zeros(batch, max_len, r, dtype=dtype, device=device)
        self.keys = torch.zeros(batch, max_len, dr, dtype=dtype, device=device)
        self.length = 0

    @property
    def nbytes(self) -> int:
        """The bytes of both buffers."""
        return self.latents.nbytes + self.keys.nbytes

    def update(self, c: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Store c (B, T, r) and k_rope (B, T, dr) after what is there; return views of all that is valid."""
        end = _end_of_chunk(self, c, k_rope)
        self.latents[:, self.length : end] = c
        self.keys[:, self.length : end] = k_rope
        self.length = end
        return self.latents[:, :end], self.keys[:, :end]  # (B, L, r), (B, L, dr)

    def truncate(self, n: int) -> None:
        """Forget all but the first n positions."""
        _check_rest(self, n)
        self.length = n

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0


def fold_norm(kv_a_layernorm_weight: Tensor, kv_b_weight: Tensor) -> Tensor:
    """Return kv_b_weight (O, r) with the gain of the norm (r,) in its columns."""
    if kv_a_layernorm_weight.shape != kv_b_weight.shape[1:]:
        raise ValueError(f"a gain {tuple(kv_a_layernorm_weight.shape)} does not fit {tuple(kv_b_weight.shape)}")
    return kv_b_weight * kv_a_layernorm_weight


def norm_counterexample(c: Tensor) -> Tensor:
    """Return a second latent (r,) such that no matrix normalizes both c (r,) and it: the same direction, twice as long."""
    return 2.0 * c


def quantize_latent(c: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    """Return codes (..., r) in int8 and scales (..., r/group) in float32, so that c is about codes * scales."""
    if c.shape[-1] % group:
        raise ValueError(f"c {tuple(c.shape)} has no whole groups of {group}")
    groups = c.float().unflatten(-1, (-1, group))  # (..., G, group)
    scales = groups.abs().amax(-1) / LEVELS  # (..., G)
    steps = torch.where(scales > 0, scales, 1.0)[..., None]  # (..., G, 1): zeros have the codes 0
    return (groups / steps).round().to(torch.int8).flatten(-2), scales


class QuantizedLatentCache:
    """A latent cache that keeps 8-bit codes, a float32 scale for each group of them, and bfloat16 rotated keys."""

    def __init__(
        self,
        batch: int,
        max_len: int,
        r: int,
        dr: int,
        *,
        group: int = 128,
        device: torch.device | str | None = None,
    ):
        if r % group:
            raise ValueError(f"a latent of width {r} has no whole groups of {group}")
        self.max_len, self.group = max_len, group
        self.latents = torch.zeros(batch, max_len, r, dtype=torch.int8, device=device)
        self.scales = torch.zeros(batch, max_len, r // group, dtype=torch.float32, device=device)
        self.keys = torch.zeros(batch, max_len, dr, dtype=torch.bfloat16, device=device)
        self.length = 0

    @property
    def bytes_per_token(self) -> int:
        """The bytes of one position of one row."""
        return sum(buffer.shape[-1] * buffer.itemsize for buffer in (self.latents, self.scales, self.keys))

    @property
    def nbytes(self) -> int:
        """The bytes of the three buffers."""
        return self.latents.nbytes + self.scales.nbytes + self.keys.nbytes

    def update(self, c: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store c (B, T, r), quantized, and k_rope (B, T, dr); return views (codes, scales, keys) of all that is valid."""
        end = _end_of_chunk(self, c, k_rope)
        new = slice(self.length, end)
        self.latents[:, new], self.scales[:, new] = quantize_latent(c, self.group)
        self.keys[:, new] = k_rope
        self.length = end
        return self.latents[:, :end], self.scales[:, :end], self.keys[:, :end]  # (B, L, r), (B, L, G), (B, L, dr)

    def truncate(self, n: int) -> None:
        """Forget all but the first n positions."""
        _check_rest(self, n)
        self.length = n

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0


def quantized_scores(q_latent: Tensor, codes: Tensor, scales: Tensor, block: int = 64) -> Tensor:
    """Return (B, H, T, S): q_latent (B, H, T, r) times the latents of codes (B, S, r) and scales (B, S, G), by blocks."""
    if q_latent.shape[::3] != codes.shape[::2]:
        raise ValueError(f"q_latent {tuple(q_latent.shape)} does not fit codes {tuple(codes.shape)}")
    if codes.shape[:2] != scales.shape[:2]:
        raise ValueError(f"codes {tuple(codes.shape)} does not fit scales {tuple(scales.shape)}")
    G, S = scales.shape[2], codes.shape[1]
    wide = torch.promote_types(q_latent.dtype, torch.float32)
    q = q_latent.to(wide)  # (B, H, T, r)
    scores = q_latent.new_empty(*q_latent.shape[:3], S)
    for start in range(0, S, block):
        part = slice(start, start + block)
        groups = codes[:, part].to(wide).unflatten(-1, (G, -1))  # (B, block, G, group)
        latents = (groups * scales[:, part, :, None]).flatten(2)  # (B, block, r)
        scores[..., part] = torch.einsum("bhtr,bsr->bhts", q, latents)  # (B, H, T, block)
    return scores


def score_error_bound(q_latent: Tensor, scales: Tensor) -> Tensor:
    """Return (B, H, T, S): how far the scores of q_latent (B, H, T, r) with quantized latents can be off.

    A code is off by half a step at most, so a group by half its scale times the sum of the query's magnitudes there.
    """
    if q_latent.shape[0] != scales.shape[0] or q_latent.shape[3] % scales.shape[2]:
        raise ValueError(f"q_latent {tuple(q_latent.shape)} does not fit scales {tuple(scales.shape)}")
    wide = torch.promote_types(q_latent.dtype, torch.float32)
    weights = q_latent.to(wide).abs().unflatten(-1, (scales.shape[2], -1)).sum(-1)  # (B, H, T, G)
    return torch.einsum("bhtg,bsg->bhts", weights, scales.to(wide)) / 2


def _end_of_chunk(cache: LatentCache | QuantizedLatentCache, c: Tensor, k_rope: Tensor) -> int:
    """Return the length after a chunk; raise if it does not fit into the buffers, or if it would drag a graph along."""
    for chunk, buffer in ((c, cache.latents), (k_rope, cache.keys)):
        if chunk.shape[::2] != buffer.shape[::2]:
            raise ValueError(f"a chunk {tuple(chunk.shape)} does not fit into a buffer {tuple(buffer.shape)}")
    if c.shape[1] != k_rope.shape[1]:
        raise ValueError(f"c {tuple(c.shape)} and k_rope {tuple(k_rope.shape)} differ in the number of positions")
    if torch.is_grad_enabled() and (c.requires_grad or k_rope.requires_grad):
        raise RuntimeError("a cache keeps no graph: call update under torch.no_grad, or detach c and k_rope")
    end = cache.length + c.shape[1]
    if end > cache.max_len:
        raise ValueError(f"{c.shape[1]} positions after {cache.length} do not fit into max_len {cache.max_len}")
    return end


def _check_rest(cache: LatentCache | QuantizedLatentCache, n: int) -> None:
    if not 0 <= n <= cache.length:
        raise ValueError(f"cannot keep {n} of {cache.length} positions")
