"""Day 18: right solutions, written differently."""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

from checker.testing import alternative
from reference.day18_multi_head import MultiHeadAttention

# head_widths


@alternative("head_widths")
def head_widths__divmod(d_model, n_heads, d_head=None, d_v=None):
    if n_heads <= 0:
        raise ValueError(f"{n_heads} heads")
    if d_head is None:
        d_head, rest = divmod(d_model, n_heads)
        if rest:
            raise ValueError(f"{n_heads} heads cannot share {d_model}")
    if d_v is None:
        d_v = d_head
    return (d_head, d_v)


# mha_costs


@alternative("mha_costs")
def mha_costs__layer_by_layer(d_model, n_heads, d_head, d_v, t, bias):
    layers = [(d_model, n_heads * d_head)] * 2 + [(d_model, n_heads * d_v), (n_heads * d_v, d_model)]
    params = flops = 0
    for n_in, n_out in layers:
        params += n_in * n_out + n_out * bool(bias)
        flops += 2 * t * n_in * n_out
    for width in (d_head, d_v):
        flops += n_heads * 2 * t * t * width
    return {"flops": flops, "params": params}


# MultiHeadAttention


def _check(x, context, module, mask):
    for value, weight in ((x, module.q_proj.weight), (context, module.k_proj.weight)):
        if value.size(-1) != weight.size(1):
            raise ValueError(f"{value.shape} does not fit {weight.shape}")
    if x.size(0) != context.size(0):
        raise ValueError(f"batches of {x.shape} and {context.shape}")
    if mask is not None:
        shape = (x.size(0), module.n_heads, x.size(1), context.size(1))
        try:
            mask = mask.broadcast_to(shape)
        except RuntimeError as error:
            raise ValueError(f"mask {mask.shape} does not stretch to {shape}") from error
    return mask


def _weights(scores, mask):
    if mask is None:
        return scores.softmax(-1)
    scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
    return torch.where(mask, scores.softmax(-1), 0)


@alternative("MultiHeadAttention")
class MultiHeadAttention__einsum(nn.Module):
    def __init__(self, d_model, n_heads, *, d_head=None, d_v=None, bias=False, d_context=None):
        super().__init__()
        if n_heads < 1:
            raise ValueError(f"n_heads={n_heads}")
        if d_head is None and d_model % n_heads:
            raise ValueError(f"d_model={d_model}, n_heads={n_heads}")
        self.n_heads = n_heads
        self.d_head = d_model // n_heads if d_head is None else d_head
        self.d_v = self.d_head if d_v is None else d_v
        context = d_model if d_context is None else d_context
        self.q_proj = nn.Linear(d_model, n_heads * self.d_head, bias=bias)
        self.k_proj = nn.Linear(context, n_heads * self.d_head, bias=bias)
        self.v_proj = nn.Linear(context, n_heads * self.d_v, bias=bias)
        self.o_proj = nn.Linear(n_heads * self.d_v, d_model, bias=bias)

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        mask = _check(x, context, self, mask)
        q = self.q_proj(x).reshape(*x.shape[:2], self.n_heads, self.d_head)
        k = self.k_proj(context).reshape(*context.shape[:2], self.n_heads, self.d_head)
        v = self.v_proj(context).reshape(*context.shape[:2], self.n_heads, self.d_v)
        wide = torch.promote_types(x.dtype, torch.float32)
        scores = torch.einsum("bihd,bjhd->bhij", q.to(wide), k.to(wide)) / math.sqrt(self.d_head)
        out = torch.einsum("bhij,bjhc->bihc", _weights(scores, mask), v.to(wide)).to(x.dtype)
        return self.o_proj(out.reshape(*x.shape[:2], self.n_heads * self.d_v))


@alternative("MultiHeadAttention")
class MultiHeadAttention__heads_in_the_batch(nn.Module):
    def __init__(self, d_model, n_heads, *, d_head=None, d_v=None, bias=False, d_context=None):
        super().__init__()
        if d_head is None:
            if n_heads < 1 or d_model / n_heads != d_model // n_heads:
                raise ValueError(f"{d_model} for {n_heads}")
            d_head = d_model // n_heads
        if n_heads < 1:
            raise ValueError(f"{n_heads}")
        d_v = d_head if d_v is None else d_v
        self.n_heads, self.d_head, self.d_v = n_heads, d_head, d_v
        d_context = d_context or d_model
        self.q_proj = nn.Linear(d_model, n_heads * d_head, bias)
        self.k_proj = nn.Linear(d_context, n_heads * d_head, bias)
        self.v_proj = nn.Linear(d_context, n_heads * d_v, bias)
        self.o_proj = nn.Linear(n_heads * d_v, d_model, bias)

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        mask = _check(x, context, self, mask)
        B, T, H = x.shape[0], x.shape[1], self.n_heads
        q, k, v = (
            y.view(B, y.shape[1], H, y.shape[2] // H).permute(0, 2, 1, 3).flatten(0, 1)
            for y in (self.q_proj(x), self.k_proj(context), self.v_proj(context))
        )
        half = x.dtype.itemsize == 2
        q, k, v = (y.float() if half else y for y in (q, k, v))
        scores = torch.bmm(q, k.transpose(1, 2)) * self.d_head**-0.5
        weights = _weights(scores, None if mask is None else mask.flatten(0, 1))
        out = torch.bmm(weights, v).unflatten(0, (B, H)).permute(0, 2, 1, 3).reshape(B, T, H * self.d_v)
        return self.o_proj(out.to(x.dtype))


# from_torch


@alternative("from_torch")
def from_torch__copies_by_slices(mha):
    if mha.add_zero_attn or mha.bias_k is not None:
        raise ValueError("add_zero_attn or add_bias_kv")
    if mha.vdim != mha.kdim:
        raise ValueError(f"kdim {mha.kdim}, vdim {mha.vdim}")
    bias = mha.out_proj.bias is not None
    weight, e = mha.out_proj.weight, mha.embed_dim
    module = MultiHeadAttention(e, mha.num_heads, bias=bias, d_context=mha.kdim)
    module = module.to(device=weight.device, dtype=weight.dtype)
    state = {"o_proj.weight": weight}
    for i, letter in enumerate("qkv"):
        part = mha.in_proj_weight
        part = getattr(mha, f"{letter}_proj_weight") if part is None else part[i * e : (i + 1) * e]
        state[f"{letter}_proj.weight"] = part
        if bias:
            state[f"{letter}_proj.bias"] = mha.in_proj_bias[i * e : (i + 1) * e]
    if bias:
        state["o_proj.bias"] = mha.out_proj.bias
    module.load_state_dict(state)
    return module


# head_contributions


@alternative("head_contributions")
def head_contributions__einsum(module, x, mask=None):
    B, T, _ = x.shape
    q, k, v = (
        F.linear(x, layer.weight, layer.bias).reshape(B, T, module.n_heads, -1)
        for layer in (module.q_proj, module.k_proj, module.v_proj)
    )
    wide = torch.promote_types(x.dtype, torch.float32)
    scores = torch.einsum("bihd,bjhd->bhij", q.to(wide), k.to(wide)) * module.d_head**-0.5
    found = torch.einsum("bhij,bjhc->bhic", _weights(scores, mask), v.to(wide)).to(x.dtype)
    columns = module.o_proj.weight.reshape(-1, module.n_heads, module.d_v)
    return torch.einsum("bhic,ohc->bhio", found, columns)


# prune_heads


@alternative("prune_heads")
def prune_heads__by_index(module, keep):
    keep = [int(head) for head in keep]
    if len(keep) == 0 or min(keep) < 0 or max(keep) >= module.n_heads or len(keep) != len({*keep}):
        raise ValueError(f"keep = {keep}")
    device = module.o_proj.weight.device

    def places(width):
        heads = torch.tensor(keep, device=device)
        return (heads[:, None] * width + torch.arange(width, device=device)).flatten()

    smaller = copy.deepcopy(module)
    for layer, width in (
        (smaller.q_proj, module.d_head),
        (smaller.k_proj, module.d_head),
        (smaller.v_proj, module.d_v),
    ):
        layer.weight = nn.Parameter(layer.weight.detach().index_select(0, places(width)))
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach().index_select(0, places(width)))
    smaller.o_proj.weight = nn.Parameter(smaller.o_proj.weight.detach().index_select(1, places(module.d_v)))
    smaller.n_heads = len(keep)
    return smaller


# stack_heads


@alternative("stack_heads")
def stack_heads__fills_head_by_head(heads):
    if len(heads) == 0:
        raise ValueError("nothing to stack")
    width, d_model = heads[0].q_proj.weight.shape
    if heads[0].o_proj.weight.shape[0] != d_model:
        raise ValueError(f"{d_model} in, {heads[0].o_proj.weight.shape[0]} out")
    for head in heads[1:]:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            one, two = getattr(heads[0], name), getattr(head, name)
            if one.weight.shape != two.weight.shape:
                raise ValueError(f"{name}: {one.weight.shape} and {two.weight.shape}")
            if (one.bias is None) != (two.bias is None):
                raise ValueError(f"{name}: one bias")
    bias = heads[0].q_proj.bias is not None
    module = MultiHeadAttention(d_model, len(heads), d_head=width, bias=bias).to(heads[0].q_proj.weight)
    with torch.no_grad():
        if bias:
            module.o_proj.bias.zero_()
        for i, head in enumerate(heads):
            rows = slice(i * width, (i + 1) * width)
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(module, name).weight[rows] = getattr(head, name).weight
                if bias:
                    getattr(module, name).bias[rows] = getattr(head, name).bias
            module.o_proj.weight[:, rows] = head.o_proj.weight
            if bias:
                module.o_proj.bias += head.o_proj.bias
    return module


# canonicalize


def _orthonormal_on_the_left(product, rank):
    """Factors (H, rank, m) and (H, rank, n) of matrices (H, m, n) of this rank; the rows of the first are orthonormal."""
    q, r = torch.linalg.qr(product[..., :rank])
    q = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1, 1)[:, None]
    return q.mT, q.mT @ product


@alternative("canonicalize")
@torch.no_grad()
def canonicalize__orthonormal_queries_and_outputs(module):
    spaces = [module.q_proj.weight.shape[1], module.k_proj.weight.shape[1]]
    for width in (module.d_head, module.d_v):
        for space in spaces:
            if width > space:
                raise ValueError(f"{width} > {space}")
    h, bias = module.n_heads, module.o_proj.bias is not None
    q, k, v = (
        torch.column_stack([layer.weight, *([layer.bias] if bias else [])]).unflatten(0, (h, -1)).double()
        for layer in (module.q_proj, module.k_proj, module.v_proj)
    )
    o = module.o_proj.weight.unflatten(1, (h, -1)).transpose(0, 1).double()
    scores = q.mT @ k
    order = scores.square().sum((1, 2)).argsort(descending=True)
    q, k = _orthonormal_on_the_left(scores[order], module.d_head)
    o, v = _orthonormal_on_the_left((o @ v)[order], module.d_v)
    found = copy.deepcopy(module).requires_grad_()
    for layer, rows in ((found.q_proj, q), (found.k_proj, k), (found.v_proj, v)):
        layer.weight.copy_(rows.flatten(0, 1)[:, : layer.weight.shape[1]])
        if bias:
            layer.bias.copy_(rows.flatten(0, 1)[:, -1])
    found.o_proj.weight.copy_(o.mT.transpose(0, 1).flatten(1))
    return found
