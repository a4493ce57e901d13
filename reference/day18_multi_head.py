"""Multi-head attention: several small attentions side by side, in as many operations as one large one.

Section 3.2.2 of Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762). The output map W_O mixes what
the heads found; read by columns, it is one map per head, and their results add up. So heads can be counted,
looked at, cut away (Michel et al., arXiv 1905.10650) and put together. Within a head only two products of its
matrices can be seen from outside, W_Q^T W_K and W_O W_V (Elhage et al., "A Mathematical Framework for
Transformer Circuits"), and `canonicalize` says what follows from this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reference.day01_tensor_basics import merge_heads, split_heads
from reference.day08_linear_layers import Linear
from reference.day16_scaled_dot_product import attention, attention_flops

if TYPE_CHECKING:
    from reference.day17_self_attention import SelfAttention

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def head_widths(d_model: int, n_heads: int, d_head: int | None = None, d_v: int | None = None) -> tuple[int, int]:
    """Return (width of queries and keys, width of values) of one head."""
    if n_heads < 1:
        raise ValueError(f"n_heads is {n_heads}, at least 1 is needed")
    if d_head is None:
        if d_model % n_heads != 0:
            raise ValueError(f"d_model {d_model} does not divide into {n_heads} heads")
        d_head = d_model // n_heads
    return d_head, d_head if d_v is None else d_v


def mha_costs(d_model: int, n_heads: int, d_head: int, d_v: int, t: int, bias: bool) -> dict[str, int]:
    """Return the parameters of a MultiHeadAttention and the FLOPs of t tokens that attend to each other."""
    widths = n_heads * (d_head + d_head + d_v)  # of q, k and v, of all heads together
    weights = d_model * (widths + n_heads * d_v)
    return {
        "params": weights + (widths + d_model if bias else 0),
        "flops": 2 * t * weights + attention_flops(1, n_heads, t, t, d_head, d_v),
    }


class MultiHeadAttention(nn.Module):
    """H attentions side by side, each with projections of its own; their outputs are mixed by `o_proj`."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        d_head: int | None = None,
        d_v: int | None = None,
        bias: bool = False,
        d_context: int | None = None,
    ):
        super().__init__()
        d_context = d_model if d_context is None else d_context
        self.n_heads = n_heads
        self.d_head, self.d_v = head_widths(d_model, n_heads, d_head, d_v)
        self.q_proj = Linear(d_model, n_heads * self.d_head, bias)
        self.k_proj = Linear(d_context, n_heads * self.d_head, bias)
        self.v_proj = Linear(d_context, n_heads * self.d_v, bias)
        self.o_proj = Linear(n_heads * self.d_v, d_model, bias)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Map x (B, T, D) to (B, T, D), attending to context (B, S, Dc), or to x itself."""
        return self.o_proj(merge_heads(_head_outputs(self, x, context, mask)))  # (B, T, D)


@torch.no_grad()
def from_torch(mha: nn.MultiheadAttention) -> MultiHeadAttention:
    """Return the MultiHeadAttention that computes what torch's does."""
    if mha.bias_k is not None or mha.add_zero_attn:
        raise ValueError("add_bias_kv and add_zero_attn add a key to the context: there is no place for it here")
    if mha.kdim != mha.vdim:
        raise ValueError(f"keys of width {mha.kdim} and values of width {mha.vdim} cannot be one context")
    if mha.in_proj_weight is None:
        weights = [mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight]
    else:
        weights = mha.in_proj_weight.chunk(3)
    weights = [*weights, mha.out_proj.weight]
    biases = None if mha.in_proj_bias is None else [*mha.in_proj_bias.chunk(3), mha.out_proj.bias]
    return _assemble(mha.num_heads, weights, biases)


def head_contributions(module: MultiHeadAttention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return what each head adds to the output, (B, H, T, D)."""
    heads = _head_outputs(module, x, None, mask)  # (B, H, T, Dv)
    return heads @ _output_maps(module).mT  # (B, H, T, D)


@torch.no_grad()
def prune_heads(module: MultiHeadAttention, keep: Sequence[int]) -> MultiHeadAttention:
    """Return a smaller module that has only the heads of `keep`."""
    keep = list(keep)
    if not keep or len(set(keep)) < len(keep) or not set(keep) <= set(range(module.n_heads)):
        raise ValueError(f"keep {keep} has to name some of the {module.n_heads} heads, each once")
    weights, biases = [], []
    for projection in (module.q_proj, module.k_proj, module.v_proj):
        weights.append(projection.weight.unflatten(0, (module.n_heads, -1))[keep].flatten(0, 1))
        if projection.bias is not None:
            biases.append(projection.bias.unflatten(0, (module.n_heads, -1))[keep].flatten())
    weights.append(_join_columns(_output_maps(module)[keep]))
    return _assemble(len(keep), weights, [*biases, module.o_proj.bias] if biases else None)


@torch.no_grad()
def stack_heads(heads: list[SelfAttention]) -> MultiHeadAttention:
    """Return one module whose output is the sum of the outputs of single heads."""
    if not heads:
        raise ValueError("no heads to stack")
    d_out, d_model = heads[0].o_proj.weight.shape[0], heads[0].q_proj.weight.shape[1]
    if d_out != d_model:
        raise ValueError(f"heads that map {d_model} to {d_out} are not heads of one module")
    layers = [[getattr(head, name) for head in heads] for name in PROJECTIONS]
    for same in layers:
        for layer in same:
            if layer.weight.shape != same[0].weight.shape:
                raise ValueError(f"heads differ: {tuple(same[0].weight.shape)} and {tuple(layer.weight.shape)}")
    has_bias = [layer.bias is not None for same in layers for layer in same]
    if any(has_bias) != all(has_bias):
        raise ValueError("some heads have biases and some have not")
    *projections, outputs = layers
    weights = [torch.cat([layer.weight for layer in same]) for same in projections]
    weights.append(torch.cat([layer.weight for layer in outputs], dim=1))
    biases = None
    if all(has_bias):
        biases = [torch.cat([layer.bias for layer in same]) for same in projections]
        biases.append(sum(layer.bias for layer in outputs))
    return _assemble(len(heads), weights, biases)


@torch.no_grad()
def canonicalize(module: MultiHeadAttention) -> MultiHeadAttention:
    """Return the one representative of all modules that differ from this one by a change of basis inside heads.

    With a bias as one more column of its matrix, scores depend on Q^T K and outputs on W_O V alone. The singular
    value decomposition gives each of the two a pair of factors that is unique up to signs.
    """
    H = module.n_heads
    widest = max(module.d_head, module.d_v)
    narrowest = min(module.q_proj.weight.shape[1], module.k_proj.weight.shape[1])
    if widest > narrowest:
        raise ValueError(f"a head of width {widest} in a space of width {narrowest} has no canonical form here")
    q, k, v = (_with_bias(layer, H) for layer in (module.q_proj, module.k_proj, module.v_proj))
    q, k, strength = _balanced_factors(q, k)  # (H, Dh, D or D + 1), (H, Dh, Dc or Dc + 1), (H, Dh)
    o, v, _ = _balanced_factors(_output_maps(module).mT, v)  # (H, Dv, D), (H, Dv, Dc or Dc + 1)
    order = strength.sum(1).argsort()  # (H,)
    rows = [x[order].flatten(0, 1) for x in (q, k, v)]  # (H*Dh or H*Dv, ...)
    output = _join_columns(o[order].mT)  # (D, H*Dv)
    if module.o_proj.bias is None:
        return _assemble(H, [*rows, output], None)
    return _assemble(H, [*(x[:, :-1] for x in rows), output], [*(x[:, -1] for x in rows), module.o_proj.bias])


def _head_outputs(module: MultiHeadAttention, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return what each head found, before the output map: (B, H, T, Dv)."""
    if context is None:
        context = x
    if context.shape[:-2] != x.shape[:-2]:
        raise ValueError(f"x {tuple(x.shape)} and context {tuple(context.shape)} differ in the batch")
    q = split_heads(module.q_proj(x), module.n_heads)  # (B, H, T, Dh)
    k = split_heads(module.k_proj(context), module.n_heads)  # (B, H, S, Dh)
    v = split_heads(module.v_proj(context), module.n_heads)  # (B, H, S, Dv)
    return attention(q, k, v, mask)[0]  # (B, H, T, Dv)


def _output_maps(module: MultiHeadAttention) -> Tensor:
    """Return the columns of the output map head by head, (H, D, Dv), as a view."""
    return module.o_proj.weight.unflatten(1, (module.n_heads, -1)).transpose(0, 1)


def _join_columns(maps: Tensor) -> Tensor:
    """Return the output map (D, H*Dv) of maps (H, D, Dv)."""
    return maps.transpose(0, 1).flatten(1)


def _with_bias(layer: nn.Module, n_heads: int) -> Tensor:
    """Return the weights of a projection head by head, its bias as one more column: (H, width, I or I + 1)."""
    weight = layer.weight
    if layer.bias is not None:
        weight = torch.cat([weight, layer.bias[:, None]], dim=1)
    return weight.unflatten(0, (n_heads, -1))


def _balanced_factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return left' and right' with the same product left^T right, and its singular values, for each head."""
    rank = left.shape[-2]
    u, s, vh = torch.linalg.svd(left.mT @ right)
    u, s, v = u[..., :rank], s[..., :rank], vh.mT[..., :rank]
    share = u.sum(-2, keepdim=True).sign() * s.sqrt()[..., None, :]  # (H, 1, rank)
    return (u * share).mT, (v * share).mT, s


def _assemble(n_heads: int, weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> MultiHeadAttention:
    """Return a module with copies of the weights (and biases) of q_proj, k_proj, v_proj and o_proj."""
    q, k, v, _ = weights
    with torch.device("meta"):  # numbers that are replaced at once need not be drawn
        module = MultiHeadAttention(
            q.shape[1],
            n_heads,
            d_head=q.shape[0] // n_heads,
            d_v=v.shape[0] // n_heads,
            bias=biases is not None,
            d_context=k.shape[1],
        )
    state = {}
    for i, name in enumerate(PROJECTIONS):
        state[f"{name}.weight"] = weights[i].clone()
        if biases is not None:
            state[f"{name}.bias"] = biases[i].clone()
    module.load_state_dict(state, assign=True)
    return module
