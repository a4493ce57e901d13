"""Day 16: right solutions, written differently."""

import math

import torch

from checker.testing import alternative

# causal_mask


@alternative("causal_mask")
def causal_mask__tril(tq, tk, *, offset=None, device=None):
    ones = torch.ones((tq, tk), dtype=torch.bool, device=device)
    return torch.tril(ones, diagonal=tk - tq if offset is None else offset)


@alternative("causal_mask")
def causal_mask__not_the_future(tq, tk, *, offset=None, device=None):
    first = tk - tq if offset is None else offset
    place = torch.arange(first, first + tq).to(device)
    return torch.logical_not(torch.arange(tk).to(device).expand(tq, tk) > place.view(tq, 1))


# combine_masks


@alternative("combine_masks")
def combine_masks__broadcast_and_multiply(*masks):
    masks = [mask for mask in masks if mask is not None]
    if not masks:
        return None
    try:
        stretched = torch.broadcast_tensors(*masks)
    except RuntimeError as error:
        raise ValueError(" and ".join(str(mask.shape) for mask in masks)) from error
    return torch.stack(stretched).all(dim=0)


@alternative("combine_masks")
def combine_masks__one_by_one(*masks):
    if len(masks) < 2:
        return masks[0] if masks else None
    first, second, *rest = masks
    if first is None or second is None:
        return combine_masks__one_by_one(second if first is None else first, *rest)
    for a, b in zip(first.shape[::-1], second.shape[::-1], strict=False):
        if a != b and a != 1 and b != 1:
            raise ValueError(f"masks {list(first.shape)} and {list(second.shape)} do not fit")
    return combine_masks__one_by_one(first * second, *rest)


# attention


def _check(q, k, v, mask):
    if q.size(-1) != k.size(-1):
        raise ValueError(f"q is {q.shape}, k is {k.shape}")
    if k.size(-2) != v.size(-2):
        raise ValueError(f"k is {k.shape}, v is {v.shape}")
    if mask is not None:
        scores = (*torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]), q.size(-2), k.size(-2))
        try:
            mask = mask.broadcast_to(scores)
        except RuntimeError as error:
            raise ValueError(f"mask is {mask.shape}, scores are {scores}") from error
    return mask


@alternative("attention")
def attention__einsum_and_torch_softmax(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    mask = _check(q, k, v, mask)
    wide = torch.promote_types(q.dtype, torch.float32)
    factor = 1 / math.sqrt(q.size(-1)) if scale is None else scale
    scores = torch.einsum("...id,...jd->...ij", q.to(wide), k.to(wide)) * factor
    if mask is None:
        weights = scores.softmax(dim=-1)
    else:
        scores = torch.where(mask, scores, torch.finfo(wide).min)
        weights = torch.where(mask, scores.softmax(dim=-1), 0)
    if dropout_p:
        where = torch.device("cpu") if generator is None else generator.device
        keep = torch.full(weights.shape, 1 - dropout_p, device=where).bernoulli(generator=generator)
        weights = torch.where(keep.bool().to(weights.device), weights / max(1 - dropout_p, 1e-9), 0)
    out = torch.einsum("...ij,...jc->...ic", weights, v.to(wide))
    return out.to(q.dtype), weights.to(q.dtype)


@alternative("attention")
def attention__divides_at_the_end(q, k, v, mask=None, scale=None, *, dropout_p=0.0, generator=None):
    mask = _check(q, k, v, mask)
    half = q.dtype in (torch.float16, torch.bfloat16)
    queries, keys, values = (x.float() if half else x for x in (q, k, v))
    scores = queries.matmul(keys.transpose(-2, -1))
    scores = scores.mul(q.size(-1) ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), float("-inf"))
    if k.size(-2) == 0:
        weights = scores
    else:
        top = scores.detach().amax(-1, keepdim=True)
        weights = (scores - torch.where(top == -torch.inf, 0, top)).exp()
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1)
    if dropout_p > 0:
        dice = torch.rand(weights.size(), generator=generator, device=generator.device if generator else None)
        weights = weights.masked_fill((dice < dropout_p).to(q.device), 0)
        if dropout_p < 1:
            weights = weights / (1 - dropout_p)
    weights = weights.type_as(q)
    return weights.matmul(v).to(q.dtype) if half else weights @ values, weights


# attention_grads


@alternative("attention_grads")
def attention_grads__einsum(dout, q, k, v, weights, scale):
    if tuple(dout.shape) != (*q.shape[:-1], v.shape[-1]):
        raise ValueError(f"dout is {tuple(dout.shape)}, out is {(*q.shape[:-1], v.shape[-1])}")
    if tuple(weights.shape) != (*q.shape[:-1], k.shape[-2]):
        raise ValueError(f"weights are {tuple(weights.shape)}, not {(*q.shape[:-1], k.shape[-2])}")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    dout, q, k, v, weights = (x.to(wide) for x in (dout, q, k, v, weights))
    dv = torch.einsum("...ij,...ic->...jc", weights, dout)
    product = torch.einsum("...ic,...jc->...ij", dout, v) * weights
    dscores = (product - weights * product.sum(-1, keepdim=True)) * scale
    dq = torch.einsum("...ij,...jd->...id", dscores, k)
    dk = torch.einsum("...ij,...id->...jd", dscores, q)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


@alternative("attention_grads")
def attention_grads__average_from_the_output(dout, q, k, v, weights, scale):
    needed = [*q.shape[:-1], v.shape[-1]], [*q.shape[:-1], k.shape[-2]]
    for found, shape in zip((dout, weights), needed, strict=True):
        if list(found.shape) != shape:
            raise ValueError(f"shape {list(found.shape)} where {shape} is needed")
    dtype = q.dtype
    dout, q, k, v, weights = (x.float() if x.dtype.itemsize == 2 else x for x in (dout, q, k, v, weights))
    dweights = dout.matmul(v.transpose(-1, -2))
    mean = (weights * dweights).sum(-1).unsqueeze(-1)
    dscores = (dweights - mean).mul(weights).mul(scale if scale is not None else q.shape[-1] ** -0.5)
    grads = dscores.matmul(k), dscores.transpose(-1, -2).matmul(q), weights.transpose(-1, -2).matmul(dout)
    return tuple(x.to(dtype) for x in grads)


# attention_flops


@alternative("attention_flops")
def attention_flops__one_product_after_the_other(b, h, tq, tk, d, dv):
    scores = b * h * tq * tk
    mixture = b * h * tq * dv
    return scores * 2 * d + mixture * 2 * tk


# logit_spread


@alternative("logit_spread")
def logit_spread__log_softmax(d, n, scale, *, generator):
    q = torch.randn((n, d), generator=generator, device=generator.device)
    k = torch.randn((n, d), generator=generator, device=generator.device)
    scores = torch.einsum("id,jd->ij", q, k).mul(1 / math.sqrt(d) if scale is None else scale)
    std = (scores - scores.mean()).square().mean().sqrt()
    logs = scores.log_softmax(-1)
    return float(std), float(-(logs.exp() * logs).sum() / n)


@alternative("logit_spread")
def logit_spread__in_double(d, n, scale, *, generator):
    q, k = (torch.randn(n, d, generator=generator, device=generator.device).double() for _ in range(2))
    scores = (q if scale is None else q * scale) @ k.mT
    scores = scores / math.sqrt(d) if scale is None else scores
    weights = torch.softmax(scores, dim=1)
    entropy = -torch.xlogy(weights, weights).sum(dim=1)
    return scores.var(unbiased=False).sqrt().item(), entropy.mean().item()


# flash_attention


class _KeysOutside(torch.autograd.Function):
    """All rows at once against one block of keys, over and over; backward goes through the same blocks."""

    @staticmethod
    def forward(ctx, q, k, v, causal, block_q, block_k):
        ctx.how = causal, block_q, block_k
        wide = torch.promote_types(q.dtype, torch.float32)
        top = torch.full(q.shape[:-1], -torch.inf, dtype=wide, device=q.device)
        total = torch.zeros_like(top)
        mixture = torch.zeros((*q.shape[:-1], v.shape[-1]), dtype=wide, device=q.device)
        for i, j in _KeysOutside.places(q, k, causal, block_q, block_k):
            s = _KeysOutside.scores(q, k, i, j, causal)
            best = torch.maximum(top[..., i], s.max(-1).values)
            safe = torch.where(best == -torch.inf, 0, best)
            p = torch.exp(s - safe[..., None])
            shrink = torch.exp(top[..., i] - safe)
            total[..., i] = total[..., i] * shrink + p.sum(-1)
            mixture[..., i, :] = mixture[..., i, :] * shrink[..., None] + p @ v[..., j, :].to(wide)
            top[..., i] = best
        total_or_one = torch.where(total == 0, 1, total)
        out = mixture.div_(total_or_one[..., None]).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, torch.where(total == 0, torch.inf, top + total_or_one.log()))
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        causal, block_q, block_k = ctx.how
        dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
        for i, j in _KeysOutside.places(q, k, causal, block_q, block_k):
            p = torch.exp(_KeysOutside.scores(q, k, i, j, causal) - lse[..., i, None])
            do, o = dout[..., i, :].to(lse.dtype), out[..., i, :].to(lse.dtype)
            ds = p * (do @ v[..., j, :].to(lse.dtype).mT - (do * o).sum(-1, keepdim=True))
            ds = ds / math.sqrt(q.shape[-1])
            dq[..., i, :] += ds @ k[..., j, :].to(lse.dtype)
            dk[..., j, :] += ds.mT @ q[..., i, :].to(lse.dtype)
            dv[..., j, :] += p.mT @ do
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), None, None, None

    @staticmethod
    def places(q, k, causal, block_q, block_k):
        Tq, Tk = q.shape[-2], k.shape[-2]
        for j in range(0, Tk, block_k):
            for i in range(0, Tq, block_q):
                if not causal or j <= min(i + block_q, Tq) - 1 + Tk - Tq:
                    yield slice(i, min(i + block_q, Tq)), slice(j, min(j + block_k, Tk))

    @staticmethod
    def scores(q, k, i, j, causal):
        wide = torch.promote_types(q.dtype, torch.float32)
        s = (q[..., i, :].to(wide) @ k[..., j, :].to(wide).mT) / math.sqrt(q.shape[-1])
        if causal:
            ones = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device)
            s = s.masked_fill(ones.triu(i.start - j.start + k.shape[-2] - q.shape[-2] + 1), -torch.inf)
        return s


@alternative("flash_attention")
def flash_attention__keys_outside(q, k, v, *, causal=False, block_q=64, block_k=64):
    _check(q, k, v, None)
    return _KeysOutside.apply(q, k, v, causal, block_q, block_k)
