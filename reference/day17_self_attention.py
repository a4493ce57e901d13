"""One learned head: projections around scaled dot-product attention, and the checks that it leaks nothing.

The layer is section 3.2 of Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762), with a single head; across
two sequences it is the attention of Bahdanau et al. (arXiv 1409.0473) in the same form. Linear attention is equations
4 to 7 and 16 to 20 of Katharopoulos et al., "Transformers are RNNs" (arXiv 2006.16236). A mask is True where a query
may attend.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from reference.day08_linear_layers import Linear
from reference.day16_scaled_dot_product import attention, causal_mask, combine_masks


def window_mask(
    tq: int, tk: int, window: int, *, offset: int | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Return the mask (tq, tk) in which a query sees its own place and the window - 1 places before it."""
    if offset is None:
        offset = tk - tq
    too_old = causal_mask(tq, tk, offset=offset - window, device=device)
    return causal_mask(tq, tk, offset=offset, device=device) & ~too_old  # (tq, tk)


def prefix_mask(t: int, prefix: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return the mask (t, t) that is causal, except that everybody sees the first `prefix` places."""
    return causal_mask(t, t, device=device) | (torch.arange(t, device=device) < prefix)  # (t, t)


def segment_mask(segments: Tensor) -> Tensor:
    """Return the mask (B, 1, T, T) in which places see each other if they belong to the same document."""
    return (segments[:, :, None] == segments[:, None, :])[:, None]  # (B, 1, T, T)


def padding_mask(lengths: Tensor, tq: int) -> Tensor:
    """Return the mask (B, 1, tq, T) that hides the keys from lengths[b] on, where T is the largest length."""
    T = int(lengths.max()) if len(lengths) else 0
    valid = torch.arange(T, device=lengths.device) < lengths[:, None]  # (B, T)
    return valid[:, None, None, :].expand(len(lengths), 1, tq, T)  # (B, 1, tq, T)


class SelfAttention(nn.Module):
    """One head of attention from a sequence to itself, with learned projections in and out."""

    def __init__(self, d_model: int, d_head: int | None = None, d_out: int | None = None, bias: bool = False):
        super().__init__()
        d_head = d_model if d_head is None else d_head
        self.q_proj = Linear(d_model, d_head, bias)
        self.k_proj = Linear(d_model, d_head, bias)
        self.v_proj = Linear(d_model, d_head, bias)
        self.o_proj = Linear(d_head, d_model if d_out is None else d_out, bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        """Map (B, T, D) to (B, T, d_out)."""
        T = x.shape[1]
        mask = _without_heads(mask)
        if causal:
            mask = combine_masks(mask, causal_mask(T, T, device=x.device))
        mixture, _ = attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), mask)  # (B, T, Dh)
        return self.o_proj(mixture)  # (B, T, d_out)


class CrossAttention(nn.Module):
    """One head of attention from a sequence to another one, the context."""

    def __init__(self, d_model: int, d_context: int, d_head: int):
        super().__init__()
        self.q_proj = Linear(d_model, d_head, bias=False)
        self.k_proj = Linear(d_context, d_head, bias=False)
        self.v_proj = Linear(d_context, d_head, bias=False)
        self.o_proj = Linear(d_head, d_model, bias=False)

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """Map x (B, T, D) and context (B, S, Dc) to (B, T, D)."""
        if len(x) != len(context):
            raise ValueError(f"x {tuple(x.shape)} and context {tuple(context.shape)} differ in their batch")
        mask = None
        if context_mask is not None:
            if context_mask.shape != context.shape[:2]:
                raise ValueError(f"context_mask {tuple(context_mask.shape)} does not fit {tuple(context.shape)}")
            mask = context_mask[:, None, :]  # (B, 1, S): keys are the last axis
        mixture, _ = attention(self.q_proj(x), self.k_proj(context), self.v_proj(context), mask)  # (B, T, Dh)
        return self.o_proj(mixture)  # (B, T, D)


def future_leak(module: Callable[[Tensor], Tensor], x: Tensor, t: int) -> float:
    """Return the largest |d out[:, :t+1] / d x[:, t+1:]|, which is 0 for a causal module."""
    x, leak = x.detach().requires_grad_(), 0.0
    with torch.enable_grad():
        for out in module(x)[:, : t + 1].flatten():
            (grad,) = torch.autograd.grad(out, x, retain_graph=True)
            future = grad[:, t + 1 :]  # (B, T - t - 1, D)
            if future.numel():
                leak = max(leak, future.abs().max().item())
    return leak


def masked_self_attention(module: SelfAttention, x: Tensor, lengths: Tensor, *, causal: bool) -> Tensor:
    """Return module(x) for a padded batch: padding is never read, and its outputs are zeros."""
    B, T, _ = x.shape
    if lengths.shape != (B,):
        raise ValueError(f"lengths {tuple(lengths.shape)} does not fit x {tuple(x.shape)}")
    valid = torch.arange(T, device=x.device) < lengths[:, None]  # (B, T)
    x = x.masked_fill(~valid[..., None], 0.0)
    out = module(x, valid[:, None, None, :], causal=causal)  # (B, T, d_out)
    return out.masked_fill(~valid[..., None], 0.0)


def fuse_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with the three input projections stacked into one, qkv_proj."""
    fused = {}
    for name, value in state.items():
        if name.startswith("q_proj."):
            kind = name.removeprefix("q_proj.")
            fused[f"qkv_proj.{kind}"] = torch.cat([value, state[f"k_proj.{kind}"], state[f"v_proj.{kind}"]])
        elif not name.startswith(("k_proj.", "v_proj.")):
            fused[name] = value
    return fused


def split_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with qkv_proj taken apart again: the inverse of `fuse_qkv`."""
    split = {}
    for name, value in state.items():
        if name.startswith("qkv_proj."):
            kind = name.removeprefix("qkv_proj.")
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                split[f"{letter}_proj.{kind}"] = part.clone()  # (d_head, ...)
        else:
            split[name] = value
    return split


def parallel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal linear attention by the table of all weights."""
    q, k = _feature_map(q), _feature_map(k)
    weights = (q @ k.mT).tril()  # (..., T, T)
    return weights @ v / weights.sum(-1, keepdim=True)  # (..., T, Dv)


def recurrent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal linear attention step by step, from a state that does not grow."""
    q, k = _feature_map(q), _feature_map(k)
    *lead, T, D = k.shape
    state = v.new_zeros(*lead, D, v.shape[-1])  # sum of k v^T
    total = v.new_zeros(*lead, D)  # sum of k
    out = torch.empty_like(v)
    for t in range(T):
        state = state + k[..., t, :, None] * v[..., t, None, :]  # (..., D, Dv)
        total = total + k[..., t, :]  # (..., D)
        mixture = (q[..., t, None, :] @ state)[..., 0, :]  # (..., Dv)
        out[..., t, :] = mixture / (q[..., t, :] * total).sum(-1, keepdim=True)
    return out


def _feature_map(x: Tensor) -> Tensor:
    """Return elu(x) + 1, which is positive: x + 1 above 0, exp(x) below."""
    return nn.functional.elu(x) + 1


def _without_heads(mask: Tensor | None) -> Tensor | None:
    """Return a mask (B, 1, T, S) as (B, T, S), and any other as it is."""
    if mask is not None and mask.dim() == 4:
        return mask[:, 0]
    return mask
