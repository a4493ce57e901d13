"""Day 17: right solutions that are written differently."""

import torch
from torch import nn
from torch.func import jacrev

from checker.testing import alternative


@alternative("segment_mask")
def segment_mask__by_difference(segments):
    return (segments.unsqueeze(-1) - segments.unsqueeze(-2)).eq(0).unsqueeze(1)


@alternative("padding_mask")
def padding_mask__by_repeat(lengths, tq):
    T = lengths.max().item() if lengths.numel() else 0
    keys = torch.arange(T, device=lengths.device).view(1, 1, 1, T)
    return (keys < lengths.view(-1, 1, 1, 1)).repeat(1, 1, tq, 1)


def _mixture(q, k, v, mask):
    scores = torch.einsum("btd,bsd->bts", q, k) * q.shape[-1] ** -0.5
    hidden = ~mask
    nothing = hidden.all(-1, keepdim=True)
    weights = scores.masked_fill(hidden & ~nothing, -torch.inf).softmax(-1).masked_fill(nothing, 0.0)
    return torch.einsum("bts,bsd->btd", weights, v)


@alternative("SelfAttention")
class SelfAttention__by_einsum(nn.Module):
    def __init__(self, d_model, d_head=None, d_out=None, bias=False):
        super().__init__()
        d_head = d_head or d_model
        for name in "qkv":
            self.add_module(f"{name}_proj", nn.Linear(d_model, d_head, bias=bias))
        self.o_proj = nn.Linear(d_head, d_out or d_model, bias=bias)

    def forward(self, x, mask=None, *, causal=False):
        B, T, D = x.shape
        if D != self.q_proj.weight.shape[1]:
            raise ValueError(f"x {tuple(x.shape)} and weight {tuple(self.q_proj.weight.shape)}")
        allowed = torch.ones(B, T, T, dtype=torch.bool, device=x.device)
        if causal:
            allowed = allowed.tril()
        if mask is not None:
            allowed = allowed & (mask.squeeze(1) if mask.dim() == 4 else mask)
        return self.o_proj(_mixture(self.q_proj(x), self.k_proj(x), self.v_proj(x), allowed))


@alternative("CrossAttention")
class CrossAttention__by_einsum(nn.Module):
    def __init__(self, d_model, d_context, d_head):
        super().__init__()
        self.q_proj = nn.Linear(d_model, d_head, bias=False)
        self.k_proj = nn.Linear(d_context, d_head, bias=False)
        self.v_proj = nn.Linear(d_context, d_head, bias=False)
        self.o_proj = nn.Linear(d_head, d_model, bias=False)

    def forward(self, x, context, context_mask=None):
        B, S, _ = context.shape
        if x.shape[0] != B:
            raise ValueError(f"{tuple(x.shape)} and {tuple(context.shape)}")
        if context_mask is None:
            context_mask = torch.ones(B, S, dtype=torch.bool, device=x.device)
        if context_mask.shape != (B, S):
            raise ValueError(f"{tuple(context_mask.shape)} and {(B, S)}")
        mask = context_mask.unsqueeze(1).expand(B, x.shape[1], S)
        return self.o_proj(_mixture(self.q_proj(x), self.k_proj(context), self.v_proj(context), mask))


@alternative("future_leak")
def future_leak__by_jacobian(module, x, t):
    table = jacrev(lambda x: module(x)[:, : t + 1])(x.detach()).detach()
    future = table[..., t + 1 :, :]
    return float(future.abs().max()) if future.numel() else 0.0


@alternative("masked_self_attention")
def masked_self_attention__row_by_row(module, x, lengths, *, causal):
    if lengths.shape != x.shape[:1]:
        raise ValueError(f"{tuple(lengths.shape)} and {tuple(x.shape)}")
    rows = []
    for row, n in zip(x, lengths.tolist(), strict=True):
        out = module(row[None, :n], causal=causal)[0]
        rows.append(torch.cat([out, out.new_zeros(len(row) - n, out.shape[-1])]))
    return torch.stack(rows)


@alternative("window_mask")
def window_mask__by_age(tq, tk, window, *, offset=None, device=None):
    first = tk - tq if offset is None else offset
    age = torch.arange(tq, device=device).unsqueeze(1) + first - torch.arange(tk, device=device)
    return (age >= 0) & (age < window)


@alternative("prefix_mask")
def prefix_mask__by_filling(t, prefix, *, device=None):
    mask = torch.ones(t, t, dtype=torch.bool, device=device).tril()
    mask[:, :prefix] = True
    return mask


@alternative("fuse_qkv")
def fuse_qkv__by_kind(state):
    fused = dict(state)
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" in state:
            fused[f"qkv_proj.{kind}"] = torch.cat([fused.pop(f"{n}_proj.{kind}") for n in "qkv"])
    return fused


@alternative("split_qkv")
def split_qkv__by_kind(state):
    split = dict(state)
    for kind in ("weight", "bias"):
        if f"qkv_proj.{kind}" in state:
            whole = split.pop(f"qkv_proj.{kind}")
            n = len(whole) // 3
            for i, name in enumerate("qkv"):
                split[f"{name}_proj.{kind}"] = whole[i * n : (i + 1) * n].clone()
    return split


def _features(x):
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


@alternative("parallel")
def parallel__by_einsum(q, k, v):
    weights = torch.einsum("...td,...sd->...ts", _features(q), _features(k))
    later = torch.ones(weights.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights = weights.masked_fill(later, 0.0)
    return torch.einsum("...ts,...sd->...td", weights / weights.sum(-1, keepdim=True), v)


@alternative("recurrent")
def recurrent__with_a_column_of_ones(q, k, v):
    q, k, out = _features(q), _features(k), []
    both = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    state = 0
    for t in range(q.shape[-2]):
        state = state + torch.einsum("...d,...e->...de", k[..., t, :], both[..., t, :])
        row = torch.einsum("...d,...de->...e", q[..., t, :], state)
        out.append(row[..., :-1] / row[..., -1:])
    return torch.stack(out, -2) if out else torch.zeros_like(v)
