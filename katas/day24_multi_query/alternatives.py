"""Day 24: right solutions, written differently."""

import math

import torch

from checker.testing import alternative
from reference.day02_tensor_operations import masked_softmax
from reference.day23_grouped_query import GroupedQueryAttention

# mean_pool_heads


def _divide(n_heads, n_groups):
    if n_groups <= 0 or n_heads % n_groups != 0:
        raise ValueError(f"n_heads {n_heads} and n_groups {n_groups}")
    return n_heads // n_groups


@alternative("mean_pool_heads")
def mean_pool_heads__matrix(w, n_heads, n_groups):
    size = _divide(n_heads, n_groups)
    if len(w) % n_heads:
        raise ValueError(f"{list(w.shape)} is {tuple(w.shape)}, which is not {n_heads} heads")
    wide = torch.promote_types(w.dtype, torch.float32)
    pool = torch.eye(n_groups, dtype=wide, device=w.device).repeat_interleave(size, 1) / size
    heads = w.to(wide).reshape(n_heads, -1)
    return (pool @ heads).reshape(-1, *w.shape[1:]).to(w.dtype)


@alternative("mean_pool_heads")
def mean_pool_heads__adds_up(w, n_heads, n_groups):
    size = _divide(n_heads, n_groups)
    if w.size(0) % n_heads != 0:
        raise ValueError(f"w {tuple(w.shape)}, n_heads {n_heads}")
    rows = w.size(0) // n_heads
    groups = []
    for group in w.split(rows * size):
        total = 0
        for head in group.split(rows):
            total = total + head.to(torch.promote_types(w.dtype, torch.float32))
        groups.append(total / size)
    return torch.cat(groups).to(w.dtype)


# multi_query_attention


def _checked(q, k, v):
    if k.shape[0] != v.shape[0] or k.shape[1] != v.shape[1]:
        raise ValueError(f"k is {k.shape}, v is {v.shape}")
    if q.size(0) != k.size(0) or q.size(-1) != k.size(-1):
        raise ValueError(f"q is {q.shape}, k is {k.shape}")


def _mask_checked(mask, shape):
    try:
        return mask.broadcast_to(shape)
    except RuntimeError as error:
        raise ValueError(f"mask is {tuple(mask.shape)}, scores are {tuple(shape)}") from error


@alternative("multi_query_attention")
def multi_query_attention__einsum(q, k, v, mask=None, scale=None):
    _checked(q, k, v)
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = torch.einsum("bhtd,bsd->bhts", q.to(wide) * scale, k.to(wide))
    weights = masked_softmax(scores, mask)
    return torch.einsum("bhts,bse->bhte", weights, v.to(wide)).to(q.dtype)


@alternative("multi_query_attention")
def multi_query_attention__token_by_token(q, k, v, mask=None, scale=None):
    _checked(q, k, v)
    B, H, T, D = q.shape
    S, Dv = v.shape[1:]
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = q.to(wide).transpose(1, 2).reshape(B, T * H, D)  # rows go token by token
    scores = torch.bmm(rows, k.to(wide).transpose(1, 2)).mul(D**-0.5 if scale is None else scale)
    if mask is not None:
        mask = _mask_checked(mask, (B, H, T, S)).transpose(1, 2).reshape(B, T * H, S)
        scores = scores.masked_fill(~mask, torch.finfo(wide).min)
    weights = scores.softmax(-1)
    if mask is not None:
        weights = weights * mask
    return torch.bmm(weights, v.to(wide)).view(B, T, H, Dv).transpose(1, 2).to(q.dtype)


# MultiQueryAttention


@alternative("MultiQueryAttention")
class MultiQueryAttention__one_group(GroupedQueryAttention):
    def __init__(self, d_model, n_heads, *, head_dim=None, base=10000.0, layout="interleaved"):
        super().__init__(d_model, n_heads, 1, head_dim=head_dim, base=base, layout=layout)


# convert_checkpoint


@alternative("convert_checkpoint")
def convert_checkpoint__copies(state, n_heads, n_kv_heads, method="mean", generator=None):
    size = _divide(n_heads, n_kv_heads)
    if method not in {"mean", "first", "random"} or (method == "random" and generator is None):
        raise ValueError(f"method {method}, generator {generator}")
    converted = {name: w.clone() for name, w in state.items()}
    for name, w in state.items():
        *_, module, _kind = "", *name.split(".")
        if module in ("k_proj", "v_proj"):
            heads = w.reshape(n_kv_heads, size, -1, *w.shape[1:])
            if method == "mean":
                new = heads.to(torch.promote_types(w.dtype, torch.float32)).mean(dim=1)
            elif method == "first":
                new = heads.select(1, 0)
            else:
                new = torch.empty(heads[:, 0].shape, device=generator.device)
                new = new.normal_(generator=generator).to(w.device) * w.double().std().item()
            converted[name] = new.reshape(-1, *w.shape[1:]).to(w.dtype)
    return converted


# conversion_error


@alternative("conversion_error")
def conversion_error__squares(module, converted, x):
    with torch.inference_mode():
        old, new = (layer(x).to(torch.float64).flatten() for layer in (module, converted))
        return math.sqrt(float((old - new) @ (old - new)) / float(old @ old))


# uptrain


@alternative("uptrain")
def uptrain__own_loop(student, teacher, batches, steps, lr, *, train="all"):
    if train not in ("all", "kv"):
        raise ValueError(f"train={train}")
    if len(batches) == 0:
        raise ValueError("no batches")
    params = []
    for path, module in student.named_modules():
        if train == "all" or path.split(".")[-1] in ("k_proj", "v_proj"):
            params += module.parameters(recurse=False)
    optimizer = torch.optim.Adam(params, lr=lr)
    losses = []
    while len(losses) < steps:
        x = batches[len(losses) % len(batches)]
        loss = torch.nn.functional.mse_loss(student(x), teacher(x).detach())
        losses.append(float(loss))
        for p, grad in zip(params, torch.autograd.grad(loss, params, allow_unused=True), strict=True):
            p.grad = grad
        optimizer.step()
    return losses


# tp_cache_bytes


@alternative("tp_cache_bytes")
def tp_cache_bytes__by_cases(kind, n_heads, n_kv_heads, head_dim, latent, world):
    if kind not in ("mha", "gqa", "mqa", "mla"):
        raise ValueError(f"kind {kind}")
    if n_heads % world != 0:
        raise ValueError(f"n_heads {n_heads}, world {world}")
    if kind == "mla":
        return 2 * latent
    if kind == "mqa":
        return 4 * head_dim
    if kind == "mha":
        return 4 * head_dim * (n_heads // world)
    if world >= n_kv_heads and world % n_kv_heads == 0:
        return 4 * head_dim
    if n_kv_heads % world != 0:
        raise ValueError(f"n_kv_heads {n_kv_heads}, world {world}")
    return 4 * head_dim * n_kv_heads // world


# optimal_shared_key


@alternative("optimal_shared_key")
def optimal_shared_key__least_squares(w_q, w_k, x_cal, n_groups):
    if tuple(w_q.shape) != tuple(w_k.shape):
        raise ValueError(f"{w_q.shape} and {w_k.shape}")
    if x_cal.shape[1] != w_q.shape[2]:
        raise ValueError(f"{x_cal.shape} and {w_q.shape}")
    size = _divide(len(w_q), n_groups)
    queries = torch.einsum("nd,hed->hne", x_cal.double(), w_q.double())
    shared = []
    for group, keys in zip(queries.split(size), w_k.double().split(size), strict=True):
        wanted = (group @ keys).flatten(0, 1)  # all queries of the group, pulled back to the width of the tokens
        shared.append(torch.linalg.pinv(group.flatten(0, 1)) @ wanted)
    return torch.stack(shared).to(w_k.dtype)
