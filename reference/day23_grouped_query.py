"""Grouped-query attention: several query heads share one head of keys and values.

Section 2 of Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints"
(arXiv 2305.13245). With G groups, query head h reads key/value head h // (H / G); G = H is multi-head attention, G = 1
multi-query attention. What shrinks is the cache and what decoding has to read from it; every query still meets every
key. `shard` splits heads over ranks as Shoeybi et al., "Megatron-LM" (arXiv 1909.08053), section 3, split a layer.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations

import torch
from torch import Tensor, nn

from reference.day01_tensor_basics import merge_heads, split_heads
from reference.day02_tensor_operations import masked_softmax
from reference.day08_linear_layers import Linear
from reference.day16_scaled_dot_product import attention_flops, causal_mask, combine_masks
from reference.day19_positions import apply_rope, apply_rope_half, rope_tables
from reference.day22_kv_cache import KVCache

LAYOUTS = {"interleaved": apply_rope, "half": apply_rope_half}


def group_of(n_heads: int, n_kv_heads: int) -> Tensor:
    """Return the key/value head of each query head, Long (n_heads,)."""
    return torch.arange(n_heads) // _group_size(n_heads, n_kv_heads)


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    """Return (B, G * n_rep, T, D) in which head h is head h // n_rep of x (B, G, T, D)."""
    B, G, T, D = x.shape
    return x[:, :, None].expand(B, G, n_rep, T, D).flatten(1, 2)  # (B, G * n_rep, T, D): a copy if n_rep > 1


def grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Return (B, H, T, Dv): the queries of a group are more rows for the same keys, so no key is repeated."""
    _check_shapes(q, k, v)
    B, H, T, D = q.shape
    _, G, S, Dv = v.shape
    rows = _group_size(H, G) * T  # query rows per key head
    if scale is None:
        scale = D**-0.5
    queries = q.reshape(B, G, rows, D)
    scores = (_at_least_float32(queries) * scale) @ _at_least_float32(k).mT  # (B, G, rows, S)
    weights = masked_softmax(scores.view(B, H, T, S), mask)  # (B, H, T, S)
    out = weights.view(B, G, rows, S) @ _at_least_float32(v)  # (B, G, rows, Dv)
    return out.view(B, H, T, Dv).to(q.dtype)


class GroupedQueryAttention(nn.Module):
    """Causal self-attention with rotary positions, H query heads and G heads of keys and values."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        *,
        head_dim: int | None = None,
        base: float = 10000.0,
        layout: str = "interleaved",
    ):
        super().__init__()
        _group_size(n_heads, n_kv_heads)  # raises if the groups are not equal
        if head_dim is None:
            if d_model % n_heads:
                raise ValueError(f"d_model {d_model} does not divide into {n_heads} heads")
            head_dim = d_model // n_heads
        if head_dim % 2:
            raise ValueError(f"head_dim {head_dim} does not divide into pairs to rotate")
        if layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.base, self.layout = base, layout
        self.q_proj = Linear(d_model, n_heads * head_dim, bias=False)
        self.k_proj = Linear(d_model, n_kv_heads * head_dim, bias=False)
        self.v_proj = Linear(d_model, n_kv_heads * head_dim, bias=False)
        self.o_proj = Linear(n_heads * head_dim, d_model, bias=False)

    def forward(
        self, x: Tensor, *, cache: KVCache | None = None, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Map x (B, T, D) to (B, T, D); a mask forbids more than causality does, positions turn queries and keys."""
        T = x.shape[1]
        start = 0 if cache is None else cache.length
        if positions is None:
            positions = torch.arange(start, start + T, device=x.device)
        tables = rope_tables(positions, self.head_dim, self.base)  # (T, Dh/2) or (B, T, Dh/2), twice
        rotate = LAYOUTS[self.layout]
        q = rotate(split_heads(self.q_proj(x), self.n_heads), *tables)  # (B, H, T, Dh)
        k = rotate(split_heads(self.k_proj(x), self.n_kv_heads), *tables)  # (B, G, T, Dh)
        v = split_heads(self.v_proj(x), self.n_kv_heads)  # (B, G, T, Dh)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, G, S, Dh)
        causal = causal_mask(T, k.shape[2], device=x.device)  # (T, S)
        out = grouped_attention(q, k, v, combine_masks(causal, mask))  # (B, H, T, Dh)
        return self.o_proj(merge_heads(out))  # (B, T, D)


def gqa_costs(
    d_model: int, n_heads: int, n_kv_heads: int, head_dim: int, length: int, dtype_bytes: int
) -> dict[str, int]:
    """Return what a layer costs: its parameters, its cache per token, and one token after `length` cached ones."""
    params = 2 * d_model * head_dim * (n_heads + n_kv_heads)
    score_flops = attention_flops(1, n_heads, 1, length + 1, head_dim, head_dim)
    return {
        "params": params,
        "cache_bytes_per_token": 2 * n_kv_heads * head_dim * dtype_bytes,
        "decode_flops": 2 * params + score_flops,
        "score_flops": score_flops,
    }


def gqa_equivalent_mha(state: dict[str, Tensor], n_heads: int, n_kv_heads: int) -> dict[str, Tensor]:
    """Return the weights of a layer with H key/value heads that computes the same: each head gets its own copy."""
    group = group_of(n_heads, n_kv_heads)

    def expand(tensor: Tensor) -> Tensor:
        heads = tensor.unflatten(0, (n_kv_heads, -1))  # (G, Dh, ...)
        return heads[group.to(tensor.device)].flatten(0, 1)  # (H * Dh, ...)

    return {name: expand(tensor) if _of_kv(name) else tensor for name, tensor in state.items()}


def shard(state: dict[str, Tensor], n_heads: int, n_kv_heads: int, world: int, rank: int) -> dict[str, Tensor]:
    """Return the weights of rank's heads; the outputs of all `world` ranks add up to those of the layer."""
    if n_heads % world or (n_kv_heads % world and world % n_kv_heads):
        raise ValueError(f"{n_heads} query heads and {n_kv_heads} key/value heads do not spread over {world} ranks")
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is none of the {world} ranks from 0 on")
    mine = torch.arange(n_heads).chunk(world)[rank]  # the query heads of this rank
    theirs = group_of(n_heads, n_kv_heads)[mine].unique()  # and the heads that they read

    def rows(tensor: Tensor, total: int, heads: Tensor) -> Tensor:
        return tensor.unflatten(0, (total, -1))[heads.to(tensor.device)].flatten(0, 1)

    part = {}
    for name, tensor in state.items():
        if _of_kv(name):
            part[name] = rows(tensor, n_kv_heads, theirs)
        elif name == "o_proj.weight":
            part[name] = rows(tensor.T, n_heads, mine).T  # o_proj reads heads: they are its columns
        else:
            part[name] = rows(tensor, n_heads, mine)
    return part


@torch.no_grad()
def best_grouping(module: nn.Module, x: Tensor, n_kv_heads: int) -> Tensor:
    """Return the order of the heads, Long (H,), whose consecutive groups have the most similar keys and values on x."""
    H = module.n_heads
    size = _group_size(H, n_kv_heads)
    heads = torch.cat([split_heads(layer(x).double(), H) for layer in (module.k_proj, module.v_proj)], -1)
    heads = heads.transpose(0, 1).flatten(1)  # (H, B * T * 2 * Dh)
    distance = (heads[:, None] - heads).square().sum(-1).tolist()  # (H, H)

    @cache
    def best(left: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        """Return the smallest sum of distances inside groups of the heads that are left, and their order."""
        if not left:
            return 0.0, ()
        first, *rest = left
        found = []
        for others in combinations(rest, size - 1):
            cost, order = best(tuple(head for head in rest if head not in others))
            group = (first, *others)
            found.append((cost + sum(distance[a][b] for a, b in combinations(group, 2)), group + order))
        return min(found)

    return torch.tensor(best(tuple(range(H)))[1], device=x.device)


def _group_size(n_heads: int, n_kv_heads: int) -> int:
    """Return how many query heads share a key/value head."""
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(f"{n_heads} query heads do not divide among {n_kv_heads} key/value heads")
    return n_heads // n_kv_heads


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError if q, k and v do not belong together."""
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} differ before their last axis")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in their first or last axis")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"the heads of q {tuple(q.shape)} do not divide among those of k {tuple(k.shape)}")


def _of_kv(name: str) -> bool:
    """Tell whether a parameter belongs to the keys or the values."""
    return name.startswith(("k_proj.", "v_proj."))


def _at_least_float32(x: Tensor) -> Tensor:
    """Return half inputs in float32 and everything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
