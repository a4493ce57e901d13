"""Scaled dot-product attention: softmax(Q K^T * scale) V, with masks, in any precision, and its backward.

The formula is equation 1 of Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762), and section 3.2.1
there gives the reason for the scale. `flash_attention` is algorithm 1 of Dao, "FlashAttention-2" (arXiv
2307.08691), and algorithm 2 backwards. One convention holds throughout: a boolean mask is True where a query
may attend, and a query that may attend to nothing gives zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reference.day02_tensor_operations import broadcast_shape, masked_softmax


def causal_mask(tq: int, tk: int, *, offset: int | None = None, device: torch.device | str | None = None) -> Tensor:
    """Return the mask (tq, tk) in which query i may attend to the keys up to i + offset."""
    if offset is None:
        offset = tk - tq  # the last query is the newest: it sees every key
    query = torch.arange(tq, device=device)[:, None]  # (tq, 1)
    key = torch.arange(tk, device=device)  # (tk,)
    return key <= query + offset  # (tq, tk)


def combine_masks(*masks: Tensor | None) -> Tensor | None:
    """Return the mask that allows what every mask allows; None allows everything."""
    combined = None
    for mask in masks:
        if combined is None:
            combined = mask
        elif mask is not None:
            broadcast_shape(tuple(combined.shape), tuple(mask.shape))  # raises if they do not fit
            combined = combined & mask
    return combined


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out, weights): each query's mixture of the values, and the weights of the mixture."""
    _check_shapes(q, k, v)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    scores = (_at_least_float32(q) * scale) @ _at_least_float32(k).mT  # (..., Tq, Tk)
    weights = masked_softmax(scores, mask)  # (..., Tq, Tk)
    if dropout_p > 0:
        weights = weights * _dropout_factors(weights, dropout_p, generator)
    out = weights @ _at_least_float32(v)  # (..., Tq, Dv)
    return out.to(q.dtype), weights.to(q.dtype)


def attention_grads(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients (dq, dk, dv) of (dout * out).sum(), with out and weights from `attention`."""
    *lead, Tq, D = q.shape
    Tk, Dv = k.shape[-2], v.shape[-1]
    if dout.shape != (*lead, Tq, Dv):
        raise ValueError(f"dout {tuple(dout.shape)} has not the shape of the output {(*lead, Tq, Dv)}")
    if weights.shape != (*lead, Tq, Tk):
        raise ValueError(f"weights {tuple(weights.shape)} are not one per query and key {(*lead, Tq, Tk)}")
    if scale is None:
        scale = D**-0.5
    dtype = q.dtype
    dout, q, k, v, weights = (_at_least_float32(x) for x in (dout, q, k, v, weights))
    dweights = dout @ v.mT  # (..., Tq, Tk)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))  # (..., Tq, Tk)
    dq = dscores @ k * scale  # (..., Tq, D)
    dk = dscores.mT @ q * scale  # (..., Tk, D)
    dv = weights.mT @ dout  # (..., Tk, Dv)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def attention_flops(b: int, h: int, tq: int, tk: int, d: int, dv: int) -> int:
    """Return the floating-point operations of both matrix products of `attention`."""
    return 2 * b * h * tq * tk * (d + dv)


def logit_spread(d: int, n: int, scale: float | None, *, generator: torch.Generator) -> tuple[float, float]:
    """Return (std, entropy) of the scores of n random queries and n random keys of width d."""
    if scale is None:
        scale = d**-0.5
    q = torch.randn(n, d, generator=generator)
    k = torch.randn(n, d, generator=generator)
    scores = q @ k.T * scale  # (n, n)
    weights = masked_softmax(scores, None)
    entropy = torch.special.entr(weights).sum() / n
    return scores.std(correction=0).item(), entropy.item()


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, block_q: int = 64, block_k: int = 64
) -> Tensor:
    """Return the output of `attention` without ever holding a tensor of the size (Tq, Tk)."""
    _check_shapes(q, k, v)
    return _FlashAttention.apply(q, k, v, causal, block_q, block_k)


class _FlashAttention(torch.autograd.Function):
    """Blocks of queries against blocks of keys, forward and backward."""

    @staticmethod
    def forward(ctx, q, k, v, causal, block_q, block_k):
        """Merge the key blocks one by one into a running maximum, sum and mixture."""
        ctx.blocks = (causal, block_q, block_k)
        *lead, Tq, _ = q.shape
        out = q.new_empty(*lead, Tq, v.shape[-1])
        logsumexp = _at_least_float32(q.new_empty(*lead, Tq, 1))
        for rows, columns in _block_grid(q, k, *ctx.blocks):
            n = len(range(Tq)[rows])
            top = logsumexp.new_full((*lead, n, 1), -torch.inf)
            total = logsumexp.new_zeros(*lead, n, 1)
            mixture = logsumexp.new_zeros(*lead, n, v.shape[-1])
            for column in columns:
                scores = _block_scores(q, k, rows, column, causal)  # (..., n, m)
                new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
                shift = new_top.masked_fill(new_top == -torch.inf, 0.0)  # -inf minus -inf would be NaN
                weights = (scores - shift).exp()
                decay = (top - shift).exp()
                total = total * decay + weights.sum(-1, keepdim=True)
                mixture = mixture * decay + weights @ _at_least_float32(v[..., column, :])
                top = new_top
            empty = total == 0
            out[..., rows, :] = mixture / total.masked_fill(empty, 1.0)
            logsumexp[..., rows, :] = (top + total.log()).masked_fill(empty, torch.inf)  # exp(s - inf) is 0
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        """Compute the weights of each block again and add up what it sends to q, k and v."""
        q, k, v, out, logsumexp = ctx.saved_tensors
        causal, scale = ctx.blocks[0], q.shape[-1] ** -0.5
        dq, dk, dv = (torch.zeros_like(x, dtype=logsumexp.dtype) for x in (q, k, v))
        for rows, columns in _block_grid(q, k, *ctx.blocks):
            q_rows, dout_rows = (_at_least_float32(x[..., rows, :]) for x in (q, dout))
            mean = (dout_rows * out[..., rows, :]).sum(-1, keepdim=True)  # equals sum(P * dP)
            for column in columns:
                k_rows, v_rows = (_at_least_float32(x[..., column, :]) for x in (k, v))
                scores = _block_scores(q, k, rows, column, causal)
                weights = (scores - logsumexp[..., rows, :]).exp()  # (..., n, m)
                dscores = weights * (dout_rows @ v_rows.mT - mean) * scale
                dq[..., rows, :] += dscores @ k_rows
                dk[..., column, :] += dscores.mT @ q_rows
                dv[..., column, :] += weights.mT @ dout_rows
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _block_grid(q, k, causal, block_q, block_k):
    """Yield each slice of queries with the slices of keys that it has to look at."""
    Tq, Tk = q.shape[-2], k.shape[-2]
    for i in range(0, Tq, block_q):
        rows = slice(i, min(i + block_q, Tq))
        visible = rows.stop + Tk - Tq if causal else Tk
        yield rows, [slice(j, min(j + block_k, Tk)) for j in range(0, visible, block_k)]


def _block_scores(q, k, rows, column, causal):
    """Return the scaled scores of one block, -inf where the mask forbids."""
    q_rows, k_rows = _at_least_float32(q[..., rows, :]), _at_least_float32(k[..., column, :])
    scores = (q_rows * q.shape[-1] ** -0.5) @ k_rows.mT  # (..., n, m)
    if not causal:
        return scores
    offset = rows.start - column.start + k.shape[-2] - q.shape[-2]
    allowed = causal_mask(*scores.shape[-2:], offset=offset, device=q.device)
    return scores.masked_fill(~allowed, -torch.inf)


def _dropout_factors(weights: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """Return 0 with probability p and 1 / (1 - p) otherwise, for each weight."""
    device = weights.device if generator is None else generator.device
    kept = torch.empty(weights.shape, device=device).bernoulli_(1 - p, generator=generator)
    return kept.to(weights) * (1 / (1 - p) if p < 1 else 0.0)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError if queries and keys differ in width, or keys and values in number."""
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in their last axis")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} differ in the number of keys")


def _at_least_float32(x: Tensor) -> Tensor:
    """Return half inputs in float32 and everything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
