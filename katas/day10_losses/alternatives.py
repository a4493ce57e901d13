import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from checker.testing import alternative


def _wider(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


@alternative("mse_loss")
def mse_loss(pred, target, reduction="mean"):
    if pred.shape != target.shape:
        raise ValueError(f"{tuple(pred.shape)} != {tuple(target.shape)}")
    squares = torch.square(_wider(pred).sub(_wider(target)))
    reduce = {"mean": torch.mean, "sum": torch.sum, "none": lambda x: x}
    if reduction not in reduce:
        raise ValueError(f"unknown reduction {reduction}")
    return reduce[reduction](squares).to(pred.dtype)


@alternative("log_softmax")
def log_softmax(x, dim=-1):
    shifted = _wider(x) - _wider(x).detach().amax(dim, keepdim=True)
    return (shifted - shifted.exp().sum(dim, keepdim=True).log()).to(x.dtype)


@alternative("cross_entropy")
def cross_entropy(logits, target, *, ignore_index=-100, label_smoothing=0.0, weight=None, reduction="mean"):
    V = logits.shape[-1]
    if target.shape != logits.shape[:-1]:
        raise ValueError(f"{tuple(target.shape)} does not fit {tuple(logits.shape)}")
    if weight is not None and tuple(weight.shape) != (V,):
        raise ValueError(f"{tuple(weight.shape)} does not fit {tuple(logits.shape)}")
    kept = target.ne(ignore_index)
    if bool((kept & ((target < 0) | (target > V - 1))).any()):
        raise IndexError("target out of range")
    logp = torch.log_softmax(_wider(logits), -1)
    w = torch.ones(V, dtype=logp.dtype, device=logp.device) if weight is None else weight.to(logp.dtype)
    index = torch.where(kept, target, torch.zeros_like(target))
    own = w[index]
    losses = -own * logp.gather(-1, index[..., None])[..., 0]
    if label_smoothing > 0:
        losses = losses * (1 - label_smoothing) - logp @ w * (label_smoothing / V)
    losses = torch.where(kept, losses, torch.zeros_like(losses))
    if reduction == "none":
        return losses.to(logits.dtype)
    if reduction == "sum":
        return losses.sum().to(logits.dtype)
    if reduction != "mean":
        raise ValueError(reduction)
    total = own[kept].sum()
    return (losses.sum() / total if total != 0 else losses.sum() * 0).to(logits.dtype)


@alternative("cross_entropy_grad")
def cross_entropy_grad(logits, target, ignore_index=-100):
    if target.shape != logits.shape[:1]:
        raise ValueError(f"{tuple(target.shape)} does not fit {tuple(logits.shape)}")
    rows = (target != ignore_index).nonzero().squeeze(-1)
    labels = target[rows]
    if labels.numel() and (labels.min() < 0 or labels.max() >= logits.shape[1]):
        raise IndexError("target out of range")
    grad = torch.zeros_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
    p = torch.softmax(_wider(logits[rows]), -1)
    p[torch.arange(len(rows), device=p.device), labels] -= 1
    grad[rows] = p / max(len(rows), 1)
    return grad.to(logits.dtype)


@alternative("bce_with_logits")
def bce_with_logits(logits, target, pos_weight=None):
    if logits.shape != target.shape:
        raise ValueError(f"{tuple(logits.shape)} and {tuple(target.shape)}")
    x, y = _wider(logits), _wider(target)
    w = 1 if pos_weight is None else pos_weight
    losses = (1 - y) * x + (1 + (w - 1) * y) * F.softplus(-x, threshold=60.0)
    return torch.mean(losses).to(logits.dtype)


@alternative("kl_divergence")
def kl_divergence(p_logits, q_logits, dim=-1):
    if p_logits.shape != q_logits.shape:
        raise ValueError(f"{tuple(p_logits.shape)} and {tuple(q_logits.shape)}")
    log_p, log_q = torch.log_softmax(_wider(p_logits), dim), torch.log_softmax(_wider(q_logits), dim)
    there = log_p.exp() > 0
    zero = torch.zeros_like(log_p)
    safe_p, safe_q = torch.where(there, log_p, zero), torch.where(there, log_q, zero)
    terms = torch.where(there, safe_p.exp(), zero) * (safe_p - safe_q)
    return terms.sum(dim).to(p_logits.dtype)


@alternative("lm_loss")
def lm_loss(logits, tokens, lengths=None):
    if tokens.shape != logits.shape[:2]:
        raise ValueError(f"{tuple(logits.shape)} and {tuple(tokens.shape)}")
    B, T = tokens.shape
    if lengths is None:
        lengths = torch.full((B,), T, device=tokens.device)
    if lengths.shape != (B,):
        raise ValueError(f"{tuple(lengths.shape)} and {tuple(tokens.shape)}")
    keep = torch.arange(T - 1, device=tokens.device)[None] + 1 < lengths[:, None]
    rows, target = _wider(logits)[:, :-1][keep], tokens[:, 1:][keep]
    if len(target) == 0:
        return logits.sum() * 0
    if target.min() < 0 or target.max() >= logits.shape[-1]:
        raise IndexError("token out of range")
    return F.cross_entropy(rows, target).to(logits.dtype)


@alternative("linear_cross_entropy")
def linear_cross_entropy(h, w, target, chunk):
    if h.shape[-1] != w.shape[-1]:
        raise ValueError(f"{tuple(h.shape)} and {tuple(w.shape)}")
    if target.shape != h.shape[:1]:
        raise ValueError(f"{tuple(h.shape)} and {tuple(target.shape)}")
    if chunk < 1:
        raise ValueError("chunk")
    return _Eager.apply(h, w, target, chunk)


class _Eager(torch.autograd.Function):
    """Both gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx, h, w, target, chunk):
        N = len(h)
        grads_h, grad_w, total = [], torch.zeros_like(w), 0.0
        for a, t in zip(h.split(chunk), target.split(chunk), strict=True):
            logp = torch.log_softmax(a @ w.T, -1)
            at = torch.arange(len(a), device=h.device), t
            total = total - logp[at].sum()
            p = logp.exp_()
            p[at] -= 1
            grads_h.append(p @ w / N)
            grad_w.addmm_(p.T, a, alpha=1 / N)
        ctx.save_for_backward(torch.cat(grads_h), grad_w)
        return total / N

    @staticmethod
    def backward(ctx, grad):
        grad_h, grad_w = ctx.saved_tensors
        return grad * grad_h, grad * grad_w, None, None


# Round 2: other roads


@alternative("linear_cross_entropy")
def linear_cross_entropy_checkpointed(h, w, target, chunk):
    if h.shape[-1] != w.shape[-1] or target.shape != h.shape[:1]:
        raise ValueError(f"{tuple(h.shape)}, {tuple(w.shape)}, {tuple(target.shape)}")
    if chunk < 1:
        raise ValueError("chunk")

    def piece(a, t):
        return F.cross_entropy(a @ w.T, t, reduction="sum")

    total = 0.0
    for a, t in zip(h.split(chunk), target.split(chunk), strict=True):
        total = total + checkpoint(piece, a, t, use_reentrant=False, preserve_rng_state=False)
    return total / len(h)


@alternative("bce_with_logits")
def bce_from_two_log_softmaxes(logits, target, pos_weight=None):
    if logits.shape != target.shape:
        raise ValueError(f"{tuple(logits.shape)} and {tuple(target.shape)}")
    x, y = _wider(logits), _wider(target)
    both = torch.log_softmax(torch.stack([torch.zeros_like(x), x]), 0)
    positive = y * both[1]
    if pos_weight is not None:
        positive = positive * pos_weight
    return -(positive + (1 - y) * both[0]).mean().to(logits.dtype)
