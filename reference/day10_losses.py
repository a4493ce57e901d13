"""Day 10: losses. Every one of them is computed from logits, and none of them ever takes the log of a probability.

Smoothing follows Szegedy et al. 2016 (arXiv:1512.00567), section 7. The chunked loss of the last task is the idea
of Wijmans et al. 2024, Cut Your Losses (arXiv:2411.09009), section 4, with chunks over the rows of the hidden states.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.day02_tensor_operations import logsumexp, softmax


def mse_loss(pred: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Squared differences of two tensors of the same shape, averaged, added up or as they are."""
    if pred.shape != target.shape:
        raise ValueError(f"pred has shape {tuple(pred.shape)} and target {tuple(target.shape)}")
    losses = (_wide(pred) - _wide(target)) ** 2
    return _reduce(losses, losses.numel(), reduction).to(pred.dtype)


def log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Return log(softmax(x)) over one axis, for entries of any size."""
    wide = _wide(x)
    return (wide - logsumexp(wide, dim, keepdim=True)).to(x.dtype)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-probability of the target class, for logits (..., V) and targets (...)."""
    V = logits.shape[-1]
    kept, labels = _labels(logits, target, ignore_index)
    wide = _wide(logits)
    w = wide.new_ones(V) if weight is None else weight.to(wide.dtype)
    if w.shape != (V,):
        raise ValueError(f"weight has shape {tuple(w.shape)}, but logits {tuple(logits.shape)} need ({V},)")
    logz = logsumexp(wide, -1)  # (...)
    picked = wide.gather(-1, labels.unsqueeze(-1)).squeeze(-1)  # (...)
    counts = w[labels] * kept  # (...)
    losses = counts * (logz - picked)
    if label_smoothing:
        uniform = (logz * w.sum() - wide @ w) / V  # (...)
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform * kept
    total = counts.sum()
    return _reduce(losses, total.masked_fill(total == 0, math.inf), reduction).to(logits.dtype)


def cross_entropy_grad(logits: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """Gradient of the mean cross-entropy with respect to logits (N, V): (softmax - onehot) / kept."""
    kept, labels = _labels(logits, target, ignore_index)
    _, V = logits.shape
    grad = softmax(_wide(logits)) - F.one_hot(labels, V)  # (N, V)
    return (grad * kept[:, None] / kept.sum().clamp(min=1)).to(logits.dtype)


def bce_with_logits(logits: Tensor, target: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """Mean binary cross-entropy of sigmoid(logits) against targets in [0, 1]."""
    if logits.shape != target.shape:
        raise ValueError(f"logits have shape {tuple(logits.shape)} and target {tuple(target.shape)}")
    wide, y = _wide(logits), _wide(target)
    zero = torch.zeros_like(wide)
    yes = y * torch.logaddexp(-wide, zero)  # -log sigmoid(x)
    no = (1 - y) * torch.logaddexp(wide, zero)  # -log(1 - sigmoid(x))
    if pos_weight is not None:
        yes = pos_weight * yes
    return (yes + no).mean().to(logits.dtype)


def kl_divergence(p_logits: Tensor, q_logits: Tensor, dim: int = -1) -> Tensor:
    """KL(p || q): the mean of log p - log q over p, for distributions given as logits along one axis."""
    if p_logits.shape != q_logits.shape:
        raise ValueError(f"p has shape {tuple(p_logits.shape)} and q {tuple(q_logits.shape)}")
    log_p = log_softmax(_wide(p_logits), dim)
    log_q = log_softmax(_wide(q_logits), dim)
    p = log_p.exp()
    ratio = (log_p - log_q).masked_fill(p == 0, 0)  # 0 log 0 = 0
    return (p * ratio).sum(dim).to(p_logits.dtype)


def lm_loss(logits: Tensor, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the next token: logits (B, T, V) at position t predict token t + 1 of (B, T)."""
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"logits have shape {tuple(logits.shape)} and tokens {tuple(tokens.shape)}")
    B, _ = tokens.shape
    target = tokens[:, 1:]
    if lengths is not None:
        if lengths.shape != (B,):
            raise ValueError(f"lengths have shape {tuple(lengths.shape)} for tokens {tuple(tokens.shape)}")
        position = torch.ones_like(target).cumsum(-1)  # 1 to T-1
        target = target.masked_fill(position >= lengths[:, None], -100)  # (B, T-1)
    return cross_entropy(logits[:, :-1], target)


def linear_cross_entropy(h: Tensor, w: Tensor, target: Tensor, chunk: int) -> Tensor:
    """Mean cross-entropy of the logits h @ w.T, of which only `chunk` rows exist at any time."""
    N, D = h.shape
    if w.shape[1:] != (D,):
        raise ValueError(f"h {tuple(h.shape)} and w {tuple(w.shape)} differ in their last axis")
    if target.shape != (N,):
        raise ValueError(f"h has shape {tuple(h.shape)} and target {tuple(target.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: there must be at least one row in a chunk")
    return _LinearCrossEntropy.apply(h, w, target, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    """Saves its inputs alone; the backward pass computes the logits of each chunk once more."""

    @staticmethod
    def forward(ctx, h, w, target, chunk):
        ctx.save_for_backward(h, w, target)
        ctx.chunk = chunk
        total = h.new_zeros(())
        for rows in _chunks(h, chunk):
            total += cross_entropy(h[rows] @ w.T, target[rows], reduction="sum")
        return total / h.shape[0]

    @staticmethod
    def backward(ctx, grad):
        h, w, target = ctx.saved_tensors
        grad_h, grad_w = torch.empty_like(h), torch.zeros_like(w)
        for rows in _chunks(h, ctx.chunk):
            n = h[rows].shape[0]
            g = cross_entropy_grad(h[rows] @ w.T, target[rows]) * (grad * n / h.shape[0])  # (chunk, V)
            grad_h[rows] = g @ w
            grad_w += g.T @ h[rows]
        return grad_h, grad_w, None, None


def _chunks(h: Tensor, chunk: int) -> list[slice]:
    """The slices that cut the rows of h into pieces."""
    return [slice(i, i + chunk) for i in range(0, h.shape[0], chunk)]


def _wide(x: Tensor) -> Tensor:
    """The tensor in at least float32, where sums are taken."""
    return x if x.dtype == torch.float64 else x.float()


def _labels(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which targets count, and targets that are safe to index with: 0 where they do not."""
    if logits.shape[:-1] != target.shape:
        raise ValueError(f"logits have shape {tuple(logits.shape)} and target {tuple(target.shape)}")
    kept = target != ignore_index
    labels = target.masked_fill(~kept, 0)
    if ((labels < 0) | (labels >= logits.shape[-1])).any():
        raise IndexError(f"a target is outside of the {logits.shape[-1]} classes")
    return kept, labels


def _reduce(losses: Tensor, count: Tensor | int, reduction: str) -> Tensor:
    """The losses as they are, their sum, or their sum over a count."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.sum() / count
    raise ValueError(f"reduction is {reduction!r}, but it must be 'mean', 'sum' or 'none'")
