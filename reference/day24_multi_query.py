"""Multi-query attention: one head of keys and values for all query heads, and how a trained layer gets there.

The layer is Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need" (arXiv 1911.02150), section 3: there
the keys lose their head axis, and the heads of the queries become rows of one product. Converting a checkpoint by the
mean of its heads, and training it a little afterwards, is section 2.1 of Ainslie et al., "GQA" (arXiv 2305.13245).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reference.day01_tensor_basics import merge_heads, split_heads
from reference.day02_tensor_operations import masked_softmax
from reference.day06_training_loop import train_step
from reference.day08_linear_layers import Linear
from reference.day10_losses import mse_loss
from reference.day11_optimizers import Adam
from reference.day16_scaled_dot_product import causal_mask, combine_masks
from reference.day19_positions import apply_rope, apply_rope_half, rope_tables
from reference.day22_kv_cache import KVCache

LAYOUTS = {"interleaved": apply_rope, "half": apply_rope_half}
METHODS = ("mean", "first", "random")
BYTES = 2  # of a number in bfloat16


def mean_pool_heads(w: Tensor, n_heads: int, n_groups: int) -> Tensor:
    """Return (G * Dh, ...): the mean of the heads of each group of w (H * Dh, ...)."""
    groups = _groups(w, n_heads, n_groups)  # (G, H / G, Dh, ...)
    return _at_least_float32(groups).mean(1).flatten(0, 1).to(w.dtype)


def multi_query_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Return (B, H, T, Dv): the queries of all heads are rows that meet the same keys, in one product."""
    _check_shapes(q, k, v)
    B, H, T, D = q.shape
    _, S, Dv = v.shape
    if scale is None:
        scale = D**-0.5
    rows = q.reshape(B, H * T, D)
    scores = (_at_least_float32(rows) * scale) @ _at_least_float32(k).mT  # (B, H * T, S)
    weights = masked_softmax(scores.view(B, H, T, S), mask)  # (B, H, T, S)
    out = weights.view(B, H * T, S) @ _at_least_float32(v)  # (B, H * T, Dv)
    return out.view(B, H, T, Dv).to(q.dtype)


class MultiQueryAttention(nn.Module):
    """Causal self-attention with rotary positions, H query heads and one head of keys and values."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        base: float = 10000.0,
        layout: str = "interleaved",
    ):
        super().__init__()
        if head_dim is None:
            if d_model % n_heads:
                raise ValueError(f"d_model {d_model} does not divide into {n_heads} heads")
            head_dim = d_model // n_heads
        if head_dim % 2:
            raise ValueError(f"head_dim {head_dim} does not divide into pairs to rotate")
        if layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, 1, head_dim
        self.base, self.layout = base, layout
        self.q_proj = Linear(d_model, n_heads * head_dim, bias=False)
        self.k_proj = Linear(d_model, head_dim, bias=False)
        self.v_proj = Linear(d_model, head_dim, bias=False)
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
        k = rotate(self.k_proj(x)[:, None], *tables)  # (B, 1, T, Dh)
        v = self.v_proj(x)[:, None]  # (B, 1, T, Dh)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, 1, S, Dh)
        causal = causal_mask(T, k.shape[2], device=x.device)  # (T, S)
        out = multi_query_attention(q, k[:, 0], v[:, 0], combine_masks(causal, mask))  # (B, H, T, Dh)
        return self.o_proj(merge_heads(out))  # (B, T, D)


def convert_checkpoint(
    state: dict[str, Tensor],
    n_heads: int,
    n_kv_heads: int,
    method: str = "mean",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return a state whose k_proj and v_proj have n_kv_heads heads, made of n_heads by the method."""
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    if method == "random" and generator is None:
        raise ValueError("method 'random' needs a generator")

    def convert(w: Tensor) -> Tensor:
        if method == "mean":
            return mean_pool_heads(w, n_heads, n_kv_heads)
        first = _groups(w, n_heads, n_kv_heads)[:, 0].flatten(0, 1)  # (G * Dh, ...)
        if method == "first":
            return first
        noise = torch.randn(first.shape, generator=generator, device=generator.device)
        return noise.to(w) * w.std()

    return {name: convert(w) if _of_kv(name) else w for name, w in state.items()}


@torch.no_grad()
def conversion_error(module: nn.Module, converted: nn.Module, x: Tensor) -> float:
    """Return |converted(x) - module(x)| / |module(x)|, with the norm over all numbers."""
    expected = module(x).double()  # and so is what is computed with it
    return ((converted(x) - expected).norm() / expected.norm()).item()


def uptrain(
    student: nn.Module, teacher: nn.Module, batches: Sequence[Tensor], steps: int, lr: float, *, train: str = "all"
) -> list[float]:
    """Train the student towards the teacher's outputs; return the loss before each step."""
    if train not in ("all", "kv"):
        raise ValueError(f"train {train!r} is none of all, kv")
    if not batches:
        raise ValueError("there is no batch to learn from")
    optimizer = Adam([p for name, p in student.named_parameters() if train == "all" or _of_kv(name)], lr=lr)
    losses = []
    for step in range(steps):
        x = batches[step % len(batches)]
        with torch.no_grad():
            target = teacher(x)
        losses.append(train_step(student, (x, target), mse_loss, optimizer))
    return losses


def tp_cache_bytes(kind: str, n_heads: int, n_kv_heads: int, head_dim: int, latent: int, world: int) -> int:
    """Return the bytes in bfloat16 that each of `world` ranks caches for one token in one layer."""
    if n_heads % world:
        raise ValueError(f"{n_heads} query heads do not spread over {world} ranks")
    if kind == "mla":
        return latent * BYTES  # every head reads all of it
    heads = {"mha": n_heads, "gqa": n_kv_heads, "mqa": 1}
    if kind not in heads:
        raise ValueError(f"kind {kind!r} is none of {', '.join(heads)}, mla")
    if heads[kind] % world and world % heads[kind]:
        raise ValueError(f"{heads[kind]} key/value heads do not spread over {world} ranks")
    return 2 * max(heads[kind] // world, 1) * head_dim * BYTES


def optimal_shared_key(w_q: Tensor, w_k: Tensor, x_cal: Tensor, n_groups: int) -> Tensor:
    """Return the keys (G, Dh, D) of groups that change the scores of x_cal (N, D) least, in the sense of squares.

    The error of one head is the trace of C_h E_h X^T X E_h^T, with E_h = W - W_h and C_h the second moment of its
    queries. Its derivative is zero for sum(C_h) W = sum(C_h W_h), whatever X^T X is.
    """
    H, Dh, D = w_k.shape
    if w_q.shape != w_k.shape:
        raise ValueError(f"w_q {tuple(w_q.shape)} and w_k {tuple(w_k.shape)} differ in shape")
    if x_cal.shape[1] != D:
        raise ValueError(f"x_cal {tuple(x_cal.shape)} does not have the width of w_k {tuple(w_k.shape)}")
    if n_groups < 1 or H % n_groups:
        raise ValueError(f"{H} heads do not divide into {n_groups} groups")
    keys = w_k.double()
    queries = x_cal.double() @ w_q.double().mT  # (H, N, Dh)
    moments = queries.mT @ queries  # (H, Dh, Dh)
    total = moments.unflatten(0, (n_groups, -1)).sum(1)  # (G, Dh, Dh)
    wanted = (moments @ keys).unflatten(0, (n_groups, -1)).sum(1)  # (G, Dh, D)
    return (torch.linalg.pinv(total) @ wanted).to(w_k.dtype)


def _groups(w: Tensor, n_heads: int, n_groups: int) -> Tensor:
    """Return a weight or bias (H * Dh, ...) as (G, H / G, Dh, ...)."""
    if n_groups < 1 or n_heads % n_groups:
        raise ValueError(f"{n_heads} heads do not divide into {n_groups} groups")
    if w.shape[0] % n_heads:
        raise ValueError(f"the rows of {tuple(w.shape)} do not divide into {n_heads} heads")
    return w.unflatten(0, (n_groups, n_heads // n_groups, -1))


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError if q, k and v do not belong together."""
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} differ before their last axis")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[2]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in their first or last axis")


def _of_kv(name: str) -> bool:
    """Tell whether a parameter belongs to the keys or the values, in a layer or in a model."""
    return name.split(".")[-2:-1] in (["k_proj"], ["v_proj"])


def _at_least_float32(x: Tensor) -> Tensor:
    """Return half inputs in float32 and everything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
