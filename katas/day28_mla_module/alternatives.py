"""Day 28: right solutions, written differently."""

import torch
import torch.nn.functional as F
from torch import nn

from checker.testing import alternative
from reference.day16_scaled_dot_product import attention
from reference.day28_mla_module import Cost, choose_mode


def _shapes(*tensors):
    return ValueError(" / ".join(str(tuple(x.shape)) for x in tensors))


@alternative("mla_cost")
def mla_cost__by_parts(cfg, t, s, mode, *, dtype_bytes=2):
    if t < 0 or t > s:
        raise ValueError(f"t {t}, s {s}")
    head = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim
    chain = [cfg.d_model, cfg.q_lora_rank, cfg.n_heads * head]
    chain = [width for width in chain if width is not None]
    per_token = sum(a * b for a, b in zip(chain, chain[1:], strict=False))
    per_token += cfg.d_model * (cfg.kv_lora_rank + cfg.qk_rope_head_dim + cfg.n_heads * cfg.v_head_dim)
    both = cfg.qk_nope_head_dim + cfg.v_head_dim
    expand = {"naive": s, "absorbed": t}
    width = {"naive": both, "absorbed": 2 * cfg.kv_lora_rank}
    if mode not in width:
        raise ValueError(f"{mode}?")
    core = expand[mode] * cfg.kv_lora_rank * both + t * s * (width[mode] + cfg.qk_rope_head_dim)
    return Cost(2 * (t * per_token + cfg.n_heads * core), dtype_bytes * s * (cfg.kv_lora_rank + cfg.qk_rope_head_dim))


@alternative("choose_mode")
def choose_mode__by_the_difference(t, s, cfg):
    if t > s:
        raise ValueError(f"{t} > {s}")
    n, r = cfg.qk_nope_head_dim + cfg.v_head_dim, cfg.kv_lora_rank
    return "naive" if s * r * n + t * s * n < t * r * n + 2 * t * s * r else "absorbed"


def _checked(q_nope, q_rope, c, k_rope, w):
    B, H, T, dn = q_nope.shape
    if q_rope.shape[:3] != (B, H, T):
        raise _shapes(q_nope, q_rope)
    if c.shape[:2] != k_rope.shape[:2]:
        raise _shapes(c, k_rope)
    if c.shape[0] != B:
        raise _shapes(c, q_nope)
    if q_rope.shape[3] != k_rope.shape[2]:
        raise _shapes(q_rope, k_rope)
    if c.shape[2] != w.shape[1]:
        raise _shapes(c, w)
    if w.shape[0] % H or w.shape[0] < H * dn:
        raise _shapes(w, q_nope)
    return B, H, T, dn, w.shape[0] // H - dn


@alternative("naive_attention")
def naive_attention__joined_keys(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    B, H, T, dn, dv = _checked(q_nope, q_rope, c, k_rope, kv_b_weight)
    S = c.shape[1]
    heads = F.linear(c, kv_b_weight).reshape(B, S, H, dn + dv)
    shared = k_rope[:, :, None].expand(B, S, H, -1)
    keys = torch.cat([heads[..., :dn], shared], -1).transpose(1, 2)
    return attention(torch.cat([q_nope, q_rope], -1), keys, heads[..., dn:].transpose(1, 2), mask, scale)[0]


@alternative("absorbed_attention")
def absorbed_attention__head_by_head(q_nope, q_rope, c, k_rope, kv_b_weight, *, mask=None, scale=None):
    B, H, T, dn, dv = _checked(q_nope, q_rope, c, k_rope, kv_b_weight)
    shape = (B, H, T, c.shape[1])
    if mask is None:
        mask = torch.ones((), dtype=torch.bool, device=c.device)
    try:
        mask = mask.expand(shape)
    except RuntimeError:
        raise ValueError(f"{tuple(mask.shape)} for {shape}") from None
    scale = (dn + q_rope.shape[-1]) ** -0.5 if scale is None else scale
    out = []
    for h, rows in enumerate(kv_b_weight.chunk(H)):
        query = q_nope[:, h] @ rows[:dn]
        scores = (query @ c.mT + q_rope[:, h] @ k_rope.mT) * scale
        scores = scores.masked_fill(~mask[:, h], torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, -1) * mask[:, h]
        out.append((weights @ c) @ rows[dn:].T)
    return torch.stack(out, 1)


class _Norm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return (
            F.rms_norm(x if x.dtype == torch.float64 else x.float(), x.shape[-1:], None, self.eps).to(x) * self.weight
        )


@alternative("MLA")
class MLA__in_one_piece(nn.Module):
    def __init__(
        self,
        d_model,
        n_heads,
        *,
        qk_nope_head_dim,
        qk_rope_head_dim,
        v_head_dim,
        kv_lora_rank,
        q_lora_rank=None,
        base=10000.0,
        softmax_scale=None,
        inv_freq=None,
        eps=1e-6,
        rope_scale=1.0,
    ):
        super().__init__()
        self.d_model, self.n_heads, self.rope_scale = d_model, n_heads, rope_scale
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.kv_lora_rank, self.q_lora_rank = kv_lora_rank, q_lora_rank
        head = qk_nope_head_dim + qk_rope_head_dim
        self.softmax_scale = head**-0.5 if softmax_scale is None else softmax_scale
        if inv_freq is None:
            inv_freq = base ** (-torch.arange(0, qk_rope_head_dim, 2).double() / qk_rope_head_dim)
        self.frequencies = inv_freq  # no buffer: it is not to be cast
        if q_lora_rank is not None:
            self.q_a_proj = nn.Linear(d_model, q_lora_rank, bias=False)
            self.q_a_layernorm = _Norm(q_lora_rank, eps)
            self.q_b_proj = nn.Linear(q_lora_rank, n_heads * head, bias=False)
        else:
            self.q_proj = nn.Linear(d_model, n_heads * head, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(d_model, kv_lora_rank + qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = _Norm(kv_lora_rank, eps)
        self.kv_b_proj = nn.Linear(kv_lora_rank, n_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.o_proj = nn.Linear(n_heads * v_head_dim, d_model, bias=False)

    def rotated(self, x, angles):
        wide = angles.dtype
        turn = torch.polar(torch.full_like(angles, self.rope_scale), angles)
        pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)).clone())
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)

    def forward(self, x, *, cache=None, mask=None, positions=None, mode="auto"):
        B, T, D = x.shape
        if D != self.d_model:
            raise ValueError(f"{tuple(x.shape)} for {self.d_model}")
        before = cache.length if cache is not None else 0
        S, H, dn, dv = before + T, self.n_heads, self.qk_nope_head_dim, self.v_head_dim
        if mode not in ("auto", "naive", "absorbed"):
            raise ValueError(f"no mode {mode}")
        mode = choose_mode(T, S, self) if mode == "auto" else mode
        order = torch.arange(S, device=x.device)
        allowed = order <= order[before:, None]
        if mask is not None:
            try:
                mask = mask.expand(B, H, T, S)
            except RuntimeError:
                raise ValueError(f"{tuple(mask.shape)} for {(B, H, T, S)}") from None
            allowed = mask & allowed
        allowed = allowed.expand(B, H, T, S)
        if positions is None:
            positions = order[before:]
        elif tuple(positions.shape) not in {(T,), (B, T)}:
            raise ValueError(f"positions {tuple(positions.shape)} for {tuple(x.shape)}")
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        angles = positions.to(wide)[..., None] * self.frequencies.to(x.device, wide)
        q = self.q_proj(x) if self.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.reshape(B, T, H, -1)
        q_rope = self.rotated(q[..., dn:], angles[..., None, :])
        down = self.kv_a_proj_with_mqa(x)
        c = self.kv_a_layernorm(down[..., : self.kv_lora_rank])
        k_rope = self.rotated(down[..., self.kv_lora_rank :], angles)
        if cache is not None:
            c, k_rope = cache.update(c, k_rope)
        up = self.kv_b_proj.weight.view(H, dn + dv, -1)
        rotary = torch.einsum("bthd,bsd->bhts", q_rope, k_rope)
        if mode == "naive":
            expanded = self.kv_b_proj(c).view(B, S, H, dn + dv)
            content = torch.einsum("bthn,bshn->bhts", q[..., :dn], expanded[..., :dn])
        else:
            content = torch.einsum("bthr,bsr->bhts", torch.einsum("bthn,hnr->bthr", q[..., :dn], up[:, :dn]), c)
        scores = ((content + rotary) * self.softmax_scale).masked_fill(~allowed, torch.finfo(x.dtype).min)
        weights = torch.softmax(scores, -1, dtype=wide).to(x.dtype) * allowed
        if mode == "naive":
            out = torch.einsum("bhts,bshv->bthv", weights, expanded[..., dn:])
        else:
            out = torch.einsum("bhtr,hvr->bthv", torch.einsum("bhts,bsr->bhtr", weights, c), up[:, dn:])
        return self.o_proj(out.reshape(B, T, H * dv))


@alternative("deinterleave_rope")
def deinterleave_rope__by_row_numbers(state, n_heads, dn, dr, r):
    if dr % 2:
        raise ValueError(f"{dr} is odd")
    order = [*range(0, dr, 2), *range(1, dr, 2)]
    result = dict(state)
    for name in state:
        for ending, heads, fixed in [("q_proj", n_heads, dn), ("q_b_proj", n_heads, dn), ("kv_a_proj_with_mqa", 1, r)]:
            if f".{name}".endswith(f".{ending}.weight"):
                rows = [
                    h * (fixed + dr) + i for h in range(heads) for i in [*range(fixed), *[fixed + j for j in order]]
                ]
                if state[name].shape[0] != len(rows):
                    raise ValueError(f"{name}: {tuple(state[name].shape)}, {len(rows)} rows needed")
                result[name] = state[name][rows]
    return result


@alternative("latent_flash_decode")
def latent_flash_decode__by_logsumexp(q_latent, q_rope, cache, splits, *, scale, lengths=None):
    if splits < 1:
        raise ValueError(f"{splits} pieces")
    B, H, T, r = q_latent.shape
    S = cache.length
    c, k_rope = cache.update(q_latent[:, 0, :0], q_rope[:, 0, :0])
    wide = torch.float64 if q_latent.dtype == torch.float64 else torch.float32
    n = torch.full((B,), S, device=q_latent.device) if lengths is None else lengths
    last = (n[:, None] - T + torch.arange(T, device=q_latent.device))[:, None, :, None]
    out = torch.zeros(B, H, T, r, dtype=wide, device=q_latent.device)
    lse = torch.full((B, H, T, 1), -torch.inf, dtype=wide, device=q_latent.device)
    step = (S + splits - 1) // splits
    for start in range(0, S, step or 1):
        stop = min(start + step, S)
        rows = (
            q_latent.reshape(B, H * T, r) @ c[:, start:stop].mT
            + q_rope.reshape(B, H * T, -1) @ k_rope[:, start:stop].mT
        )
        scores = rows.reshape(B, H, T, -1).to(wide) * scale
        scores = scores.masked_fill(torch.arange(start, stop, device=c.device) > last, -torch.inf)
        here = scores.logsumexp(-1, keepdim=True)
        weights = torch.where(here > -torch.inf, (scores - here).exp(), 0.0).to(c.dtype)
        mixture = (weights.reshape(B, H * T, -1) @ c[:, start:stop]).reshape(B, H, T, r).to(wide)
        both = torch.logaddexp(lse, here)
        safe = both.masked_fill(both == -torch.inf, 0.0)
        out = out * (lse - safe).exp() + mixture * (here - safe).exp()
        lse = both
    return out.to(q_latent.dtype)
