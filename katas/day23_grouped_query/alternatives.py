"""Day 23: right solutions, written differently."""

import itertools
import math

import torch
from torch import nn

from checker.testing import alternative

# group_of


@alternative("group_of")
def group_of__multiplies_first(n_heads, n_kv_heads):
    if n_kv_heads <= 0 or n_heads % n_kv_heads != 0:
        raise ValueError(f"n_heads={n_heads}, n_kv_heads={n_kv_heads}")
    return torch.div(torch.arange(n_heads) * n_kv_heads, n_heads, rounding_mode="floor")


@alternative("group_of")
def group_of__list(n_heads, n_kv_heads):
    size, rest = divmod(n_heads, n_kv_heads) if n_kv_heads > 0 else (0, 1)
    if rest or not size:
        raise ValueError(f"{n_kv_heads} groups cannot be made of {n_heads} heads")
    return torch.tensor([g for g in range(n_kv_heads) for _ in range(size)], dtype=torch.long)


# repeat_kv


@alternative("repeat_kv")
def repeat_kv__picks_heads(x, n_rep):
    if n_rep == 1:
        return x
    return x[:, torch.arange(x.shape[1] * n_rep, device=x.device) // n_rep]


@alternative("repeat_kv")
def repeat_kv__stacks(x, n_rep):
    B, G, T, D = x.shape
    return x if n_rep == 1 else torch.stack([x] * n_rep, dim=2).view(B, G * n_rep, T, D)


# grouped_attention


def _checked(q, k, v):
    if tuple(k.shape[:-1]) != tuple(v.shape[:-1]):
        raise ValueError(f"k is {k.shape}, v is {v.shape}")
    if q.size(0) != k.size(0) or q.size(-1) != k.size(-1):
        raise ValueError(f"q is {q.shape}, k is {k.shape}")
    if k.size(1) == 0 or q.size(1) % k.size(1) != 0:
        raise ValueError(f"q is {list(q.shape)}, k is {list(k.shape)}")


def _mask_checked(mask, shape):
    try:
        return mask.broadcast_to(shape)
    except RuntimeError as error:
        raise ValueError(f"mask is {tuple(mask.shape)}, scores are {tuple(shape)}") from error


@alternative("grouped_attention")
def grouped_attention__einsum(q, k, v, mask=None, scale=None):
    _checked(q, k, v)
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.to(wide).unflatten(1, (G, H // G)) * (1 / math.sqrt(D) if scale is None else scale)
    scores = torch.einsum("bgrtd,bgsd->bgrts", groups, k.to(wide))
    if mask is None:
        weights = scores.softmax(-1)
    else:
        mask = _mask_checked(mask, (B, H, T, S)).unflatten(1, (G, H // G))
        weights = scores.masked_fill(~mask, torch.finfo(wide).min).softmax(-1).masked_fill(~mask, 0.0)
    out = torch.einsum("bgrts,bgse->bgrte", weights, v.to(wide))
    return out.flatten(1, 2).to(q.dtype)


@alternative("grouped_attention")
def grouped_attention__one_group_after_the_other(q, k, v, mask=None, scale=None):
    _checked(q, k, v)
    B, H, T, D = q.shape
    G, S, Dv = v.shape[1:]
    size = H // G
    wide = torch.promote_types(q.dtype, torch.float32)
    if mask is not None:
        mask = _mask_checked(mask, (B, H, T, S))
    queries = q.to(wide).transpose(1, 2).reshape(B, T, G, size, D)
    queries = queries.permute(0, 2, 1, 3, 4).reshape(B * G, T * size, D)  # rows go token by token
    keys, values = k.to(wide).reshape(B * G, S, D), v.to(wide).reshape(B * G, S, Dv)
    scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(D**-0.5 if scale is None else scale)
    if mask is not None:
        rows = mask.reshape(B, G, size, T, S).transpose(2, 3).reshape(B * G, T * size, S)
        scores = scores.masked_fill(~rows, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True) if S else scores.new_zeros(B * G, T * size, 1)
    weights = (scores - torch.where(top == -torch.inf, 0.0, top)).exp()
    total = weights.sum(-1, keepdim=True)
    out = torch.bmm(weights / torch.where(total == 0, 1.0, total), values)
    return out.view(B, G, T, size, Dv).transpose(2, 3).reshape(B, H, T, Dv).to(q.dtype)


# GroupedQueryAttention


class _Plain(nn.Module):
    def __init__(self, d_model, n_heads, n_kv_heads, *, head_dim=None, base=10000.0, layout="interleaved"):
        super().__init__()
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(f"n_heads {n_heads}, n_kv_heads {n_kv_heads}")
        if head_dim is None and d_model % n_heads:
            raise ValueError(f"d_model {d_model}, n_heads {n_heads}")
        head_dim = head_dim or d_model // n_heads
        if head_dim % 2:
            raise ValueError(f"head_dim {head_dim} is odd")
        if layout not in ("half", "interleaved"):
            raise ValueError(f"no such layout: {layout}")
        self.n_heads, self.n_kv_heads, self.head_dim, self.layout = n_heads, n_kv_heads, head_dim, layout
        self.base = base
        self.q_proj = nn.Linear(d_model, n_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * head_dim, d_model, bias=False)

    def _turn(self, x, positions):
        """Turn x (B, T, n, Dh), before the heads are moved to the front."""
        speed = self.base ** (-torch.arange(0, self.head_dim, 2, device=x.device).double() / self.head_dim)
        angle = positions[..., None, None].double() * speed
        cos, sin = angle.cos(), angle.sin()
        if self.layout == "half":
            a, b = x.tensor_split(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(x.dtype)


@alternative("GroupedQueryAttention")
class GroupedQueryAttention__einsum(_Plain):
    def forward(self, x, *, cache=None, mask=None, positions=None):
        B, T, _ = x.shape
        past = cache.length if cache is not None else 0
        if positions is None:
            positions = past + torch.arange(T, device=x.device)
        q = self._turn(self.q_proj(x).unflatten(-1, (self.n_heads, -1)), positions).transpose(1, 2)
        k = self._turn(self.k_proj(x).unflatten(-1, (self.n_kv_heads, -1)), positions).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.n_kv_heads, -1)).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v)
        S = k.shape[2]
        allowed = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        if mask is not None:
            allowed = allowed & mask
        out = grouped_attention__einsum(q, k, v, allowed)
        return self.o_proj(out.permute(0, 2, 1, 3).reshape(B, T, -1))


@alternative("GroupedQueryAttention")
class GroupedQueryAttention__other_order(_Plain):
    def forward(self, x, *, cache=None, mask=None, positions=None):
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
            if cache is not None:
                positions += cache.length
        v = self.v_proj(x).view(*x.shape[:2], -1, self.head_dim).permute(0, 2, 1, 3)
        k = self._turn(self.k_proj(x).view(*x.shape[:2], -1, self.head_dim), positions).permute(0, 2, 1, 3)
        keys, values = (k, v) if cache is None else cache.update(k, v)
        q = self._turn(self.q_proj(x).view(*x.shape[:2], -1, self.head_dim), positions).permute(0, 2, 1, 3)
        T, S = x.shape[1], keys.shape[2]
        past = torch.arange(S, device=x.device)[None] < torch.arange(S - T + 1, S + 1, device=x.device)[:, None]
        past = past if mask is None else torch.logical_and(mask, past)
        out = grouped_attention__one_group_after_the_other(q, keys, values, past)
        return self.o_proj(out.transpose(1, 2).flatten(2))


# gqa_costs


@alternative("gqa_costs")
def gqa_costs__weight_by_weight(d_model, n_heads, n_kv_heads, head_dim, length, dtype_bytes):
    q = o = d_model * n_heads * head_dim
    k = v = d_model * n_kv_heads * head_dim
    scores = n_heads * (length + 1) * head_dim * 2
    mixture = n_heads * head_dim * (length + 1) * 2
    return {
        "score_flops": scores + mixture,
        "decode_flops": 2 * (q + k + v + o) + scores + mixture,
        "cache_bytes_per_token": (n_kv_heads * head_dim + n_kv_heads * head_dim) * dtype_bytes,
        "params": q + k + v + o,
    }


# gqa_equivalent_mha


@alternative("gqa_equivalent_mha")
def gqa_equivalent_mha__repeat_interleave(state, n_heads, n_kv_heads):
    if n_heads % n_kv_heads:
        raise ValueError(f"n_heads {n_heads}, n_kv_heads {n_kv_heads}")
    wide = dict(state)
    for name in wide:
        if name[:6] in ("k_proj", "v_proj"):
            heads = wide[name].reshape(n_kv_heads, -1, *wide[name].shape[1:])
            wide[name] = heads.repeat_interleave(n_heads // n_kv_heads, dim=0).reshape(-1, *wide[name].shape[1:])
    return wide


@alternative("gqa_equivalent_mha")
def gqa_equivalent_mha__pieces(state, n_heads, n_kv_heads):
    size, rest = divmod(n_heads, n_kv_heads)
    if rest:
        raise ValueError(f"{n_heads} heads are no {n_kv_heads} groups")
    wide = {}
    for name, w in state.items():
        if name.split(".")[0] in ("k_proj", "v_proj"):
            w = torch.cat([head for head in w.chunk(n_kv_heads) for _ in range(size)])
        wide[name] = w.clone()
    return wide


# shard


@alternative("shard")
def shard__slices(state, n_heads, n_kv_heads, world, rank):
    if n_heads % world != 0:
        raise ValueError(f"n_heads {n_heads} and world {world}")
    if n_heads % n_kv_heads != 0:
        raise ValueError(f"n_heads {n_heads} and n_kv_heads {n_kv_heads}")
    if max(n_kv_heads, world) % min(n_kv_heads, world) != 0:
        raise ValueError(f"n_kv_heads {n_kv_heads} and world {world}")
    if rank not in range(world):
        raise ValueError(f"rank {rank} in a world of {world}")
    part = {}
    for name, w in state.items():
        if name[0] == "o":
            width = w.shape[1] // world
            part[name] = w[:, rank * width : (rank + 1) * width].clone()
        elif name[0] == "q" or n_kv_heads >= world:
            rows = w.shape[0] // world
            part[name] = w[rank * rows : (rank + 1) * rows].clone()
        else:
            rows, head = w.shape[0] // n_kv_heads, rank * n_kv_heads // world
            part[name] = w.narrow(0, head * rows, rows)
    return part


# best_grouping


@alternative("best_grouping")
def best_grouping__all_of_them(module, x, n_kv_heads):
    H = module.n_heads
    if n_kv_heads <= 0 or H % n_kv_heads:
        raise ValueError(f"{H} heads, {n_kv_heads} groups")
    size = H // n_kv_heads
    with torch.no_grad():
        both = torch.stack((module.k_proj(x), module.v_proj(x))).double()
    heads = both.unflatten(-1, (H, -1)).movedim(-2, 0).flatten(1)

    def spread(group):
        some = heads[list(group)]
        return (some - some.mean(0)).pow(2).sum().item()

    costs = {group: spread(group) for group in itertools.combinations(range(H), size)}

    def groupings(left):
        if not left:
            yield ()
            return
        for others in itertools.combinations(left[1:], size - 1):
            group = (left[0], *others)
            for rest in groupings([h for h in left if h not in group]):
                yield (group, *rest)

    best = min(groupings(list(range(H))), key=lambda grouping: sum(costs[group] for group in grouping))
    return torch.tensor(best, device=x.device).flatten()
