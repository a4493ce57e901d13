"""Day 27: right solutions, written differently."""

import torch
from torch import nn

from checker.testing import alternative
from reference.day14_custom_modules import RMSNorm
from reference.day19_positions import apply_rope


def _shapes(*tensors):
    return ValueError(" / ".join(str(tuple(x.shape)) for x in tensors))


def _project(x, weight):
    if x.shape[-1] != weight.shape[1]:
        raise _shapes(x, weight)
    return torch.einsum("...i,oi->...o", x, weight)


def _spin(x, cos, sin):
    """Pairs as complex numbers where torch has them, as a stack of two products where not."""
    if cos.shape[-2:] != (x.shape[-2], x.shape[-1] // 2) or cos.dim() not in (2, 3):
        raise _shapes(cos, x)
    if cos.dim() == 3 and cos.shape[0] != x.shape[0]:
        raise _shapes(cos, x)
    if cos.dim() == 3 and x.dim() == 4:
        cos, sin = cos[:, None], sin[:, None]
    wide = torch.promote_types(x.dtype, cos.dtype)
    pairs = torch.view_as_complex(x.to(wide).contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos.to(wide), sin.to(wide))).flatten(-2).to(x.dtype)


@alternative("mla_parameter_count")
def mla_parameter_count__by_shapes(d_model, n_heads, dn, dr, dv, r, rq=None):
    shapes = {
        "kv_a_proj_with_mqa": (r + dr, d_model),
        "kv_a_layernorm": (r, 1),
        "kv_b_proj": (n_heads * dn + n_heads * dv, r),
        "o_proj": (d_model, n_heads * dv),
    }
    rows = n_heads * dn + n_heads * dr
    if rq is not None:
        shapes.update(q_a_proj=(rq, d_model), q_a_layernorm=(rq, 1), q_b_proj=(rows, rq))
    else:
        shapes["q_proj"] = (rows, d_model)
    out = {name: a * b for name, (a, b) in shapes.items()}
    out["total"] = sum(out.values())
    return out


@alternative("KVDown")
class KVDownInOne(nn.Module):
    def __init__(self, d_model, r, dr, eps=1e-6):
        super().__init__()
        self.kv_a_proj_with_mqa = nn.Linear(d_model, r + dr, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(r, eps=eps)

    def forward(self, x, cos, sin):
        r = len(self.kv_a_layernorm.weight)
        both = _project(x, self.kv_a_proj_with_mqa.weight)
        latent = both[..., :r]
        wide = latent.double()
        size = (wide.pow(2).sum(-1, keepdim=True) / r + self.kv_a_layernorm.eps).sqrt()
        return (wide / size * self.kv_a_layernorm.weight).to(x.dtype), _spin(both[..., r:], cos, sin)


@alternative("split_kv_b")
def split_kv_b__by_view(weight, n_heads, dn, dv):
    rows, r = weight.shape
    if rows != n_heads * (dn + dv):
        raise ValueError(f"{tuple(weight.shape)}: {n_heads * (dn + dv)} rows were expected")
    heads = weight.as_strided(
        (n_heads, dn + dv, r), ((dn + dv) * weight.stride(0), *weight.stride()), weight.storage_offset()
    )
    return heads[:, :dn], heads[:, dn:]


@alternative("KVUp")
class KVUpByEinsum(nn.Module):
    def __init__(self, r, n_heads, dn, dv):
        super().__init__()
        self.h, self.dn = n_heads, dn
        self.kv_b_proj = nn.Linear(r, n_heads * (dn + dv), bias=False)

    def forward(self, c):
        if c.shape[-1] != self.kv_b_proj.weight.shape[1]:
            raise _shapes(c, self.kv_b_proj.weight)
        heads = torch.einsum("bsr,hnr->bhsn", c, self.kv_b_proj.weight.unflatten(0, (self.h, -1)))
        return heads[..., : self.dn].contiguous(), heads[..., self.dn :].contiguous()


@alternative("QueryPath")
class QueryPathByLists(nn.Module):
    def __init__(self, d_model, n_heads, dn, dr, rq=None, eps=1e-6):
        super().__init__()
        self.h, self.dn = n_heads, dn
        if rq:
            self.q_a_proj = nn.Linear(d_model, rq, bias=False)
            self.q_a_layernorm = RMSNorm(rq, eps=eps)
            self.q_b_proj = nn.Linear(rq, n_heads * (dn + dr), bias=False)
        else:
            self.q_proj = nn.Linear(d_model, n_heads * (dn + dr), bias=False)

    def forward(self, x, cos, sin):
        if hasattr(self, "q_proj"):
            q = _project(x, self.q_proj.weight)
        else:
            q = _project(self.q_a_layernorm(_project(x, self.q_a_proj.weight)), self.q_b_proj.weight)
        q = q.reshape(*q.shape[:2], self.h, -1).permute(0, 2, 1, 3)
        return q[..., : self.dn], _spin(q[..., self.dn :], cos, sin)


@alternative("decoupled_scores")
def decoupled_scores__in_one_call(q_nope, q_rope, k_nope, k_rope, scale=None):
    B, H, T, dn = q_nope.shape
    S, dr = k_nope.shape[2], q_rope.shape[-1]
    if q_rope.shape != (B, H, T, dr):
        raise _shapes(q_rope, q_nope)
    if k_nope.shape != (B, H, S, dn):
        raise _shapes(k_nope, q_nope, k_rope)
    if k_rope.shape != (B, S, dr):
        raise _shapes(k_rope, k_nope, q_rope)
    scale = (dn + dr) ** -0.5 if scale is None else scale
    content = (q_nope.flatten(0, 1) @ k_nope.flatten(0, 1).mT).reshape(B, H * T, S)
    both = torch.baddbmm(content, q_rope.reshape(B, H * T, dr), k_rope.mT, beta=scale, alpha=scale)
    return both.reshape(B, H, T, S)


@alternative("LatentCache")
class LatentCacheInOneBuffer:
    def __init__(self, batch, max_len, r, dr, *, dtype=torch.float32, device=None):
        self.buffer = torch.empty((batch, max_len, r + dr), dtype=dtype, device=device)
        self.r, self.max_len, self.length, self.nbytes = r, max_len, 0, self.buffer.nbytes

    def update(self, c, k_rope):
        B, _, width = self.buffer.shape
        T = c.shape[1]
        if c.shape != (B, T, self.r) or k_rope.shape != (B, T, width - self.r):
            raise _shapes(c, k_rope, self.buffer)
        if self.length + T > self.max_len:
            raise ValueError(f"no room: {T} after {self.length} of {self.max_len}")
        if torch.is_grad_enabled() and any(x.requires_grad for x in (c, k_rope)):
            raise RuntimeError("detach first")
        with torch.no_grad():
            place = self.buffer.narrow(1, self.length, T)
            place[..., : self.r].copy_(c)
            place[..., self.r :].copy_(k_rope)
        self.length += T
        valid = self.buffer[:, : self.length]
        return valid[..., : self.r], valid[..., self.r :]

    def truncate(self, n):
        if n < 0 or n > self.length:
            raise ValueError(n)
        self.length = n

    def reset(self):
        self.truncate(0)


@alternative("fold_norm")
def fold_norm__einsum(kv_a_layernorm_weight, kv_b_weight):
    if kv_a_layernorm_weight.shape != (kv_b_weight.shape[1],):
        raise _shapes(kv_a_layernorm_weight, kv_b_weight)
    return torch.einsum("r,or->or", kv_a_layernorm_weight, kv_b_weight)


@alternative("norm_counterexample")
def norm_counterexample__shorter_and_mirrored(c):
    return -c / 5


@alternative("quantize_latent")
def quantize_latent__by_loop(c, group=128):
    if c.shape[-1] % group != 0:
        raise _shapes(c)
    codes, scales = torch.zeros_like(c, dtype=torch.int8), []
    for start in range(0, c.shape[-1], group):
        part = c[..., start : start + group].to(torch.float32)
        scale = torch.amax(part.abs(), -1, keepdim=True) / 127
        steps = (part / scale).nan_to_num(0.0)
        codes[..., start : start + group] = torch.floor(steps + 0.5).clamp(-127, 127).to(torch.int8)
        scales.append(scale)
    return codes, torch.cat(scales, -1)


@alternative("quantized_scores")
def quantized_scores__scaled_afterwards(q_latent, codes, scales, block=64):
    B, H, T, r = q_latent.shape
    S, G = codes.shape[1], scales.shape[-1]
    if codes.shape != (B, S, r):
        raise _shapes(q_latent, codes)
    if scales.shape != (B, S, G):
        raise _shapes(codes, scales)
    wide = torch.float64 if q_latent.dtype == torch.float64 else torch.float32
    parts = []
    for start in range(0, S, block):
        total = 0.0
        for q, code, scale in zip(
            q_latent.to(wide).chunk(G, -1),
            codes[:, start : start + block].chunk(G, -1),
            scales[:, start : start + block].unbind(-1),
            strict=True,
        ):
            total = total + (q @ code.to(wide).mT[:, None]) * scale.to(wide)[:, None, None]
        parts.append(total)
    return torch.cat(parts, -1).to(q_latent.dtype) if parts else q_latent.new_zeros(B, H, T, 0)


@alternative("score_error_bound")
def score_error_bound__repeated(q_latent, scales):
    r, G = q_latent.shape[-1], scales.shape[-1]
    if len(q_latent) != len(scales) or r % G:
        raise _shapes(q_latent, scales)
    wide = torch.float64 if q_latent.dtype == torch.float64 else torch.float32
    half = scales.to(wide).repeat_interleave(r // G, -1) / 2
    return q_latent.to(wide).abs() @ half.mT[:, None]


@alternative("QuantizedLatentCache")
class QuantizedLatentCacheByHand:
    def __init__(self, batch, max_len, r, dr, *, group=128, device=None):
        if r % group:
            raise ValueError(f"{r} is no multiple of {group}")
        self.size, self.group, self.max_len, self.length = (batch, r, dr), group, max_len, 0
        self.codes = torch.empty(batch, max_len, r, dtype=torch.int8, device=device)
        self.scales = torch.empty(batch, max_len, r // group, dtype=torch.float32, device=device)
        self.keys = torch.empty(batch, max_len, dr, dtype=torch.bfloat16, device=device)

    @property
    def bytes_per_token(self):
        _, r, dr = self.size
        return r + r // self.group * 4 + dr * 2

    @property
    def nbytes(self):
        return self.size[0] * self.max_len * self.bytes_per_token

    def update(self, c, k_rope):
        batch, r, dr = self.size
        T, start = c.shape[1], self.length
        if c.shape != (batch, T, r) or k_rope.shape != (batch, T, dr):
            raise _shapes(c, k_rope)
        if start + T > self.max_len:
            raise ValueError(f"no room: {T} after {start} of {self.max_len}")
        if torch.is_grad_enabled() and (c.requires_grad or k_rope.requires_grad):
            raise RuntimeError("no graph here")
        groups = c.float().reshape(batch, T, r // self.group, self.group)
        scales = groups.abs().amax(-1) / 127
        codes = torch.nan_to_num(groups / scales[..., None]).round().reshape(batch, T, r)
        for buffer, new in ((self.codes, codes), (self.scales, scales), (self.keys, k_rope)):
            buffer[:, start : start + T] = new
        self.length += T
        return tuple(buffer[:, : self.length] for buffer in (self.codes, self.scales, self.keys))

    def truncate(self, n):
        if n not in range(self.length + 1):
            raise ValueError(n)
        self.length = n

    def reset(self):
        self.length = 0


@alternative("norm_counterexample")
def norm_counterexample__longer(c):
    return c * 100


@alternative("decoupled_scores")
def decoupled_scores__scaled_queries(q_nope, q_rope, k_nope, k_rope, scale=None):
    if not (
        q_nope.shape[:3] == q_rope.shape[:3]
        and q_nope.shape[:2] == k_nope.shape[:2]
        and q_nope.shape[3:] == k_nope.shape[3:]
        and k_rope.shape == (k_nope.shape[0], k_nope.shape[2], q_rope.shape[3])
    ):
        raise _shapes(q_nope, q_rope, k_nope, k_rope)
    if scale is None:
        scale = 1 / (q_nope.shape[3] + q_rope.shape[3]) ** 0.5
    scores = torch.einsum("bhtn,bhsn->bhts", q_nope * scale, k_nope)
    return scores.add_(torch.einsum("bhtd,bsd->bhts", q_rope * scale, k_rope))


@alternative("KVDown")
class KVDownWithTorchsParts(nn.Module):
    def __init__(self, d_model, r, dr, eps=1e-6):
        super().__init__()
        self.sizes = (r, dr)
        self.kv_a_proj_with_mqa = nn.Linear(d_model, r + dr, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(r, eps=eps)

    def forward(self, x, cos, sin):
        if x.shape[-1] != self.kv_a_proj_with_mqa.in_features:
            raise _shapes(x, self.kv_a_proj_with_mqa.weight)
        latent, key = torch.split(self.kv_a_proj_with_mqa(x), self.sizes, dim=2)
        return self.kv_a_layernorm(latent), apply_rope(key, cos, sin)
