"""Right solutions of day 2 that are written differently from the reference."""

from itertools import zip_longest

import torch

from checker.testing import alternative


@alternative("broadcast_shape")
def broadcast_shape(a, b):
    sizes = []
    for m, n in zip_longest(reversed(a), reversed(b), fillvalue=1):
        if len({m, n} - {1}) > 1:
            raise ValueError(f"{torch.Size(a)} does not go with {torch.Size(b)}")
        sizes.append(max({m, n} - {1}, default=1))
    return tuple(sizes[::-1])


@alternative("column_mse")
def column_mse(pred, target):
    if tuple(pred.shape) != tuple(target.shape):
        raise ValueError(f"got {list(pred.shape)} and {list(target.shape)}")
    gap = pred - target
    return torch.einsum("nd,nd->d", gap, gap) / len(gap)


@alternative("standardize")
def standardize(x, eps=1e-5):
    y = x.float() if x.element_size() < 4 else x
    variance, mean = torch.var_mean(y, dim=-1, correction=0, keepdim=True)
    return ((y - mean) * torch.rsqrt(variance + eps)).type_as(x)


@alternative("logsumexp")
def logsumexp(x, dim, keepdim=False):
    y = x.movedim(dim, -1)
    y = y.float() if x.element_size() < 4 else y
    if y.shape[-1] == 0:
        result = y.new_full(y.shape[:-1], -torch.inf)
    else:
        top = y.detach().max(-1).values.nan_to_num()
        result = (y - top.unsqueeze(-1)).exp().sum(-1).log() + top
    return (result.unsqueeze(dim) if keepdim else result).to(x.dtype)


@alternative("softmax")
def softmax(x, dim=-1):
    if not x.shape:
        raise ValueError("a number has no axis")
    if not x.numel():
        return torch.empty_like(x)
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    lowered = y - y.max(dim, keepdim=True).values.detach()
    return (lowered - lowered.exp().sum(dim, keepdim=True).log()).exp().to(x.dtype)


@alternative("masked_softmax")
def masked_softmax(x, mask, dim=-1):
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    try:
        mask = mask.broadcast_to(x.shape)
    except RuntimeError as error:
        raise ValueError(f"{mask.shape} for scores of {x.shape}") from error
    if x.numel() == 0:
        return torch.zeros_like(x)
    y = torch.where(mask, x.float() if x.element_size() < 4 else x, -torch.inf)
    top = y.detach().amax(dim, keepdim=True).clamp(min=torch.finfo(y.dtype).min)
    weights = (y - top).exp()
    return (weights / weights.sum(dim, keepdim=True).clamp(min=1e-30)).to(x.dtype)


@alternative("masked_mean")
def masked_mean(x, mask, dim=None, keepdim=False):
    if mask is None:
        mask = x.new_ones(x.shape, dtype=torch.bool)
    try:
        mask = mask.expand_as(x)
    except RuntimeError as error:
        raise ValueError(f"{tuple(mask.shape)} against {tuple(x.shape)}") from error
    axes = tuple(range(x.dim())) if dim is None else dim
    y = torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))
    y = y.float() if x.element_size() < 4 else y
    count = mask.to(y.dtype).sum(axes, keepdim=keepdim)
    return (y.sum(axes, keepdim=keepdim) / torch.where(count == 0, 1, count)).to(x.dtype)


@alternative("pairwise_sq_dist")
def pairwise_sq_dist(a, b):
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"{a.shape} and {b.shape}")
    u, v = (a.float(), b.float()) if a.element_size() < 4 else (a, b)
    total = u.new_zeros(len(a), len(b))
    for left, right in zip(u.unbind(1), v.unbind(1), strict=True):
        total = total + (left[:, None] - right[None, :]) ** 2
    return total.to(a.dtype)


@alternative("chunked_logsumexp")
def chunked_logsumexp(chunks):
    chunks = iter(chunks)
    try:
        chunk = next(chunks)
    except StopIteration:
        raise ValueError("there is no chunk") from None
    rows, dtype = chunk.shape[:-1], chunk.dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    top = torch.full(rows, torch.finfo(work).min, dtype=work, device=chunk.device)
    total = torch.zeros_like(top)
    while chunk is not None:
        if chunk.shape[:-1] != rows:
            raise ValueError(f"rows {chunk.shape[:-1]} do not continue {rows}")
        if chunk.numel():
            new = torch.maximum(top, chunk.to(work).amax(-1)).clamp(max=torch.finfo(work).max)
            total = total * (top - new).exp() + (chunk.to(work) - new.unsqueeze(-1)).exp().sum(-1)
            top = new
        chunk = next(chunks, None)
    return torch.where(total > 0, top + total.log(), -torch.inf).to(dtype)


@alternative("column_mse")
def column_mse_by_columns(pred, target):
    if pred.shape != target.shape:
        raise ValueError(f"{pred.shape} != {target.shape}")
    return torch.stack([((p - t) ** 2).mean() for p, t in zip(pred.T, target.T, strict=True)])


@alternative("standardize")
def standardize_with_std(x, eps=1e-5):
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y - y.mean(-1, keepdim=True)
    return (y / torch.sqrt(y.pow(2).sum(-1, keepdim=True) / x.size(-1) + eps)).to(x.dtype)


@alternative("softmax")
def softmax_row_by_row(x, dim=-1):
    if x.dim() == 0:
        raise ValueError("a number has no axis")
    moved = x.movedim(dim, -1)
    rows = []
    for row in moved.flatten(0, -2) if x.dim() > 1 else [moved]:
        row = row.float() if x.element_size() < 4 else row
        weights = [] if len(row) == 0 else (row - row.max()).exp()
        rows.append(row if len(row) == 0 else weights / weights.sum())
    return torch.stack(rows).reshape(moved.shape).movedim(-1, dim).to(x.dtype) if rows else x.clone()


@alternative("masked_softmax")
def masked_softmax_row_by_row(x, mask, dim=-1):
    if mask is None:
        mask = torch.ones((), dtype=torch.bool, device=x.device)
    if mask.dim() > x.dim() or any(m not in (1, n) for m, n in zip(mask.shape[::-1], x.shape[::-1], strict=False)):
        raise ValueError(f"mask {mask.shape}, scores {x.shape}")
    moved, keep = x.movedim(dim, -1), mask.expand(x.shape).movedim(dim, -1)
    result = torch.zeros(moved.shape, dtype=x.dtype, device=x.device)
    for place in torch.cartesian_prod(*[torch.arange(n) for n in moved.shape[:-1]]).reshape(-1, x.dim() - 1).tolist():
        kept = keep[tuple(place)].nonzero()[:, 0]
        if len(kept):
            row = moved[tuple(place)][kept]
            row = row.float() if x.element_size() < 4 else row
            weights = (row - row.max()).exp()
            result[tuple(place)] = result[tuple(place)].index_put((kept,), (weights / weights.sum()).to(x.dtype))
    return result.movedim(-1, dim)


@alternative("pairwise_sq_dist")
def pairwise_sq_dist_row_by_row(a, b):
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"widths differ: {a.shape}, {b.shape}")
    wide = torch.promote_types(a.dtype, torch.float32)
    rows = [(row.to(wide) - b.to(wide)).square().sum(1) for row in a]
    return torch.stack(rows).to(a.dtype) if rows else a.new_zeros(0, len(b))


@alternative("masked_softmax")
def masked_softmax_replacing_nan(x, mask, dim=-1):
    if mask is None:
        mask = torch.ones((), dtype=torch.bool, device=x.device)
    if mask.dim() > x.dim() or any(m not in (1, n) for m, n in zip(mask.shape[::-1], x.shape[::-1], strict=False)):
        raise ValueError(f"mask {mask.shape}, scores {x.shape}")
    if not x.numel():
        return x.clone()
    y = torch.where(mask, x.float() if x.element_size() < 4 else x, -torch.inf)
    y = (y - y.amax(dim, keepdim=True)).exp()
    return torch.where(mask, y / y.sum(dim, keepdim=True), 0.0).to(x.dtype)
