"""Multi-head latent attention: one module, one cache, and two orders of multiplication.

DeepSeek-V2 (arXiv:2405.04434), section 2.1 and appendix C, equations 37 to 47; parameters have the names of the published
checkpoints. Long blocks of queries expand the latents to keys and values and attend as usual. A few queries against
many latents bring the queries to the latent space instead, attend there and come back: the same numbers, with other
costs (`mla_cost`). The stretch is split-key decoding (Dao et al., "Flash-Decoding", 2023) on latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reference.day01_tensor_basics import merge_heads, split_heads
from reference.day02_tensor_operations import broadcast_shape, masked_softmax
from reference.day08_linear_layers import Linear, linear
from reference.day14_custom_modules import RMSNorm
from reference.day16_scaled_dot_product import causal_mask, combine_masks
from reference.day19_positions import apply_rope, interleaved_to_half, rope_tables
from reference.day26_mla_theory import absorbed_scores, absorbed_values
from reference.day27_mla_components import LatentCache, decoupled_scores, split_kv_b


@dataclass(frozen=True)
class MLAConfig:
    """The sizes of one layer; an MLA has attributes of the same names."""

    d_model: int
    n_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int
    q_lora_rank: int | None = None


class Cost(NamedTuple):
    """What one call costs, for one sequence."""

    flops: int
    cache_bytes: int


def mla_cost(cfg: MLAConfig | MLA, t: int, s: int, mode: str, *, dtype_bytes: int = 2) -> Cost:
    """Return the FLOPs of t new tokens among s keys, and the bytes that the cache holds for the s keys."""
    if not 0 <= t <= s:
        raise ValueError(f"{t} new tokens cannot be among {s} keys")
    D, H, dn, dr = cfg.d_model, cfg.n_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim
    dv, r, rq = cfg.v_head_dim, cfg.kv_lora_rank, cfg.q_lora_rank
    queries = D * H * (dn + dr) if rq is None else D * rq + rq * H * (dn + dr)
    products = t * (queries + D * (r + dr) + H * dv * D)  # what both modes share
    if mode == "naive":
        products += s * r * H * (dn + dv)  # every latent becomes keys and values
        products += H * t * s * (dn + dr + dv)
    elif mode == "absorbed":
        products += H * t * r * (dn + dv)  # queries into the latent space, mixtures out of it
        products += H * t * s * (r + dr + r)
    else:
        raise ValueError(f"mode {mode!r} is neither 'naive' nor 'absorbed'")
    return Cost(2 * products, s * (r + dr) * dtype_bytes)


def choose_mode(t: int, s: int, cfg: MLAConfig | MLA) -> str:
    """Return the mode with fewer FLOPs for t new tokens among s keys; "absorbed" where they are equal."""
    naive, absorbed = (mla_cost(cfg, t, s, mode).flops for mode in ("naive", "absorbed"))
    return "naive" if naive < absorbed else "absorbed"


def naive_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    c: Tensor,
    k_rope: Tensor,
    kv_b_weight: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return (B, H, T, dv): attention to the keys and values that the latents c (B, S, r) expand to."""
    _check_shapes(q_nope, q_rope, c, k_rope, kv_b_weight)
    _, H, _, dn = q_nope.shape
    expanded = split_heads(linear(c, kv_b_weight), H)  # (B, H, S, dn+dv)
    scores = decoupled_scores(q_nope, q_rope, expanded[..., :dn], k_rope, scale)  # (B, H, T, S)
    return masked_softmax(scores, mask) @ expanded[..., dn:]  # (B, H, T, dv)


def absorbed_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    c: Tensor,
    k_rope: Tensor,
    kv_b_weight: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return what `naive_attention` returns, without a key or a value: attention to the latents themselves."""
    _check_shapes(q_nope, q_rope, c, k_rope, kv_b_weight)
    _, H, _, dn = q_nope.shape
    w_uk, w_uv = split_kv_b(kv_b_weight, H, dn, len(kv_b_weight) // H - dn)  # (H, dn, r), (H, dv, r)
    if scale is None:
        scale = (dn + q_rope.shape[3]) ** -0.5
    scores = absorbed_scores(q_nope, c, w_uk)  # (B, H, T, S)
    scores += torch.einsum("bhtd,bsd->bhts", q_rope, k_rope)
    scores *= scale
    return absorbed_values(masked_softmax(scores, mask), c, w_uv)  # (B, H, T, dv)


class MLA(nn.Module):
    """Causal multi-head latent attention, with the parameter names of DeepSeek's checkpoints."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        kv_lora_rank: int,
        q_lora_rank: int | None = None,
        base: float = 10000.0,
        softmax_scale: float | None = None,
        inv_freq: Tensor | None = None,
        eps: float = 1e-6,
        rope_scale: float = 1.0,
    ):
        super().__init__()
        self.d_model, self.n_heads = d_model, n_heads
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.kv_lora_rank, self.q_lora_rank = kv_lora_rank, q_lora_rank
        self.base, self.rope_scale = base, rope_scale
        width = qk_nope_head_dim + qk_rope_head_dim
        self.softmax_scale = width**-0.5 if softmax_scale is None else softmax_scale
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        if q_lora_rank is None:
            self.q_proj = Linear(d_model, n_heads * width, bias=False)
        else:
            self.q_a_proj = Linear(d_model, q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(q_lora_rank, eps)
            self.q_b_proj = Linear(q_lora_rank, n_heads * width, bias=False)
        self.kv_a_proj_with_mqa = Linear(d_model, kv_lora_rank + qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(kv_lora_rank, eps)
        self.kv_b_proj = Linear(kv_lora_rank, n_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.o_proj = Linear(n_heads * v_head_dim, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        cache: LatentCache | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        mode: str = "auto",
    ) -> Tensor:
        """Map x (B, T, D) to (B, T, D); with a cache, its tokens follow those that are in there."""
        B, T, _ = x.shape
        start = 0 if cache is None else cache.length
        S = start + T
        if mode == "auto":
            mode = choose_mode(T, S, self)
        if mode not in PATHS:
            raise ValueError(f"mode {mode!r} is none of 'auto', {', '.join(map(repr, PATHS))}")
        mask = self._visible(mask, (B, self.n_heads, T, S), x.device)
        tables = self._tables(x, positions, start)  # (T, dr/2) or (B, T, dr/2), twice
        q_nope, q_rope = self._queries(x, *tables)  # (B, H, T, dn), (B, H, T, dr)
        c, k_rope = self._latents(x, *tables)  # (B, T, r), (B, T, dr)
        if cache is not None:
            c, k_rope = cache.update(c, k_rope)  # (B, S, r), (B, S, dr)
        weight = self.kv_b_proj.weight
        out = PATHS[mode](q_nope, q_rope, c, k_rope, weight, mask=mask, scale=self.softmax_scale)  # (B, H, T, dv)
        return self.o_proj(merge_heads(out))  # (B, T, D)

    def _visible(self, mask: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
        """Return the mask of the scores: no key that comes later, and none that `mask` hides."""
        if mask is not None and broadcast_shape(tuple(mask.shape), shape) != shape:
            raise ValueError(f"mask {tuple(mask.shape)} does not broadcast to the scores {shape}")
        *_, T, S = shape
        causal = causal_mask(T, S, device=device) if T > 1 else None  # a single token is the newest of all
        return combine_masks(causal, mask)

    def _tables(self, x: Tensor, positions: Tensor | None, start: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin for the positions of x."""
        B, T, _ = x.shape
        if positions is None:
            positions = torch.arange(start, start + T, device=x.device)  # (T,)
        if positions.shape not in ((T,), (B, T)):
            raise ValueError(f"positions {tuple(positions.shape)} do not fit x {tuple(x.shape)}")
        if x.dtype == torch.float64:
            positions = positions.double()  # and so are the angles
        cos, sin = rope_tables(positions, self.qk_rope_head_dim, self.base, inv_freq=self.inv_freq)
        return cos * self.rope_scale, sin * self.rope_scale

    def _queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return q_nope (B, H, T, dn) and the rotated q_rope (B, H, T, dr)."""
        q = self.q_proj(x) if self.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = split_heads(q, self.n_heads)  # (B, H, T, dn+dr)
        dn = self.qk_nope_head_dim
        return q[..., :dn], apply_rope(q[..., dn:], cos, sin)

    def _latents(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is cached: the normalized latent (B, T, r) and the rotated key (B, T, dr)."""
        down = self.kv_a_proj_with_mqa(x)  # (B, T, r+dr)
        r = self.kv_lora_rank
        return self.kv_a_layernorm(down[..., :r]), apply_rope(down[..., r:], cos, sin)

    def _apply(self, fn, recurse=True):
        """Move the frequencies with the module, but never cast them: bfloat16 angles would be worth nothing."""
        exact = self.inv_freq
        super()._apply(fn, recurse)
        if exact is not None:
            self.inv_freq = exact.to(self.inv_freq.device)
        return self


PATHS = {"naive": naive_attention, "absorbed": absorbed_attention}


def deinterleave_rope(state: Mapping[str, Tensor], n_heads: int, dn: int, dr: int, r: int) -> dict[str, Tensor]:
    """Return the state dict of a layer that pairs rotary columns i and i + dr/2 where `state` pairs 2i and 2i + 1."""
    result = {}
    for key, tensor in state.items():
        name = ".".join(key.split(".")[-2:])
        if name in ("q_proj.weight", "q_b_proj.weight"):
            tensor = _halved(key, tensor, n_heads, dn, dr)
        elif name == "kv_a_proj_with_mqa.weight":
            tensor = _halved(key, tensor, 1, r, dr)
        result[key] = tensor
    return result


def latent_flash_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: LatentCache,
    splits: int,
    *,
    scale: float,
    lengths: Tensor | None = None,
) -> Tensor:
    """Return mixtures of latents (B, H, T, r) for the newest T tokens, reading the cache in `splits` pieces."""
    B, H, T, r = q_latent.shape
    c, k_rope = cache.update(q_latent.new_empty(B, 0, r), q_rope.new_empty(B, 0, q_rope.shape[-1]))  # all there is
    S = c.shape[1]
    if splits < 1:
        raise ValueError(f"{S} keys cannot be read in {splits} pieces")
    if lengths is None:
        lengths = torch.full((B,), S, device=c.device)
    newest = lengths[:, None] - T + torch.arange(T, device=c.device)  # (B, T): the last key that each query sees
    wide = torch.float64 if q_latent.dtype == torch.float64 else torch.float32
    top = q_latent.new_full((B, H, T, 1), -torch.inf)  # and wide from the first piece on
    total = q_latent.new_zeros(B, H, T, 1)
    mixture = q_latent.new_zeros(B, H, T, r)
    size = max(1, -(-S // splits))
    for start in range(0, S, size):
        latents, keys = c[:, start : start + size], k_rope[:, start : start + size]  # (B, n, r), (B, n, dr)
        scores = torch.einsum("bhtr,bnr->bhtn", q_latent, latents) + torch.einsum("bhtd,bnd->bhtn", q_rope, keys)
        allowed = torch.arange(start, start + latents.shape[1], device=c.device) <= newest[..., None]  # (B, T, n)
        scores = (scores.to(wide) * scale).masked_fill(~allowed[:, None], -torch.inf)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        shift = new_top.clamp(min=torch.finfo(wide).min)  # -inf minus -inf would be NaN
        weights, decay = (scores - shift).exp(), (top - shift).exp()
        total = total * decay + weights.sum(-1, keepdim=True)
        mixture = mixture * decay + torch.einsum("bhtn,bnr->bhtr", weights.to(c.dtype), latents)
        top = new_top
    return (mixture / total.clamp(min=1.0)).to(q_latent.dtype)  # the largest weight is 1, unless there is none


def _halved(key: str, weight: Tensor, n_heads: int, fixed: int, dr: int) -> Tensor:
    """Return weight with the last dr rows of each head in the order 0, 2, ..., 1, 3, ..."""
    wanted = n_heads * (fixed + dr)
    if weight.shape[0] != wanted:
        raise ValueError(f"{key} {tuple(weight.shape)} has not {wanted} rows: {n_heads} x ({fixed} + {dr})")
    rows = weight.unflatten(0, (n_heads, fixed + dr))  # (H, fixed+dr, D)
    halved = interleaved_to_half(rows[:, fixed:].flatten(0, 1), n_heads)  # (H*dr, D)
    return torch.cat((rows[:, :fixed], halved.unflatten(0, (n_heads, dr))), 1).flatten(0, 1)


def _check_shapes(q_nope: Tensor, q_rope: Tensor, c: Tensor, k_rope: Tensor, kv_b_weight: Tensor) -> None:
    """Raise ValueError where queries, latents, keys and weight do not fit each other."""
    H, dn = q_nope.shape[1::2]
    pairs = [
        ("q_nope", q_nope, "q_rope", q_rope, q_nope.shape[:3] == q_rope.shape[:3]),
        ("q_rope", q_rope, "k_rope", k_rope, q_rope.shape[3] == k_rope.shape[2]),
        ("c", c, "k_rope", k_rope, c.shape[:2] == k_rope.shape[:2]),
        ("c", c, "kv_b_weight", kv_b_weight, c.shape[2] == kv_b_weight.shape[1]),
        ("q_nope", q_nope, "kv_b_weight", kv_b_weight, len(kv_b_weight) % H == 0 and len(kv_b_weight) >= H * dn),
    ]
    for name, tensor, other_name, other, fits in pairs:
        if not fits:
            raise ValueError(f"{name} {tuple(tensor.shape)} does not fit {other_name} {tuple(other.shape)}")
