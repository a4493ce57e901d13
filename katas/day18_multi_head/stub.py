"""Day 18: multi-head attention. `kata lesson` explains, `kata check` tells you where you are.

B sequences of T tokens, D wide, attend with H heads to S tokens of a context, Dc wide (to themselves, if there is
none). Queries and keys of one head are Dh wide, its values Dv. In all projections the features of head 0 come
first, then those of head 1, and so on: head h owns the rows h*Dh to (h+1)*Dh - 1 of `q_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch  # noqa: F401
from day01_tensor_basics import merge_heads, split_heads  # noqa: F401 - yours, if you passed these days
from day08_linear_layers import Linear  # noqa: F401
from day16_scaled_dot_product import attention, attention_flops  # noqa: F401
from torch import Tensor, nn

if TYPE_CHECKING:
    from day17_self_attention import SelfAttention


def head_widths(d_model: int, n_heads: int, d_head: int | None = None, d_v: int | None = None) -> tuple[int, int]:
    """Return (d_head, d_v): the width of queries and keys and the width of values of one head, as ints.

    d_head: None means d_model / n_heads, which has to be a whole number: if n_heads does not divide d_model,
        ValueError with both numbers. A d_head that is given is taken as it is, whatever d_model is.
    d_v: None means as wide as queries and keys. One that is given is taken as it is.
    n_heads below 1 raises ValueError with the number in the message.
    """
    raise NotImplementedError


def mha_costs(d_model: int, n_heads: int, d_head: int, d_v: int, t: int, bias: bool) -> dict[str, int]:
    """Return {"params": ..., "flops": ...} of a MultiHeadAttention of these sizes, two ints.

    params: how many numbers its four projections hold, with the biases of all four if `bias`
    flops: of the matrix products of one forward pass over one sequence of t tokens that attend to each other,
        projections included. A multiplication and the addition that follows it are two operations. Adding the
        biases, scale, softmax and mask are not counted.
    """
    raise NotImplementedError


class MultiHeadAttention(nn.Module):
    """H attentions side by side, each with its own projections of the input; their outputs are mixed by a last one.

    Four linear layers, each with a bias if `bias`, and no other parameters:
        q_proj  D -> H*Dh       k_proj  Dc -> H*Dh      v_proj  Dc -> H*Dv      o_proj  H*Dv -> D
    Attributes: n_heads, d_head, d_v. `head_widths` says what None means and what is refused.
    d_context: the width Dc of the contexts it will be given; None means d_model
    """

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
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Map x (B, T, D) to (B, T, D): queries come from x, keys and values from context (B, S, Dc).

        context: None means x itself (where Dc is D)
        mask: boolean, True = may attend, stretched by the rules of broadcasting to (B, H, T, S), so (T, S) is one
            mask for all, (H, T, S) one for each head and (B, 1, 1, S) one for the tokens of each context;
            None = all. A query that may attend to nothing gets zeros from that head, and gradients are never NaN.
        Each head divides its scores by sqrt(Dh). Concatenated, head 0 first, the heads go through o_proj.

        The result has the dtype of x, which is that of the parameters; scores and softmax of half inputs are
        float32. x need not be contiguous, nothing that comes in is changed, and B, T and S may be 0. Gradients
        flow to x, context and all parameters.
        ValueError with both shapes when x or context does not fit its projection (shapes of the input and of the
        weight), when the batches of x and context differ, and when the mask does not stretch to (B, H, T, S).
        Cost: six matrix products whatever H is, with the FLOPs of `mha_costs`. No loops.
        """
        raise NotImplementedError


def from_torch(mha: nn.MultiheadAttention) -> MultiHeadAttention:
    """Return the MultiHeadAttention that computes what `mha` computes in eval mode.

    Biases come along, or their lack. If `mha` was made with kdim = vdim, this is the width of the context.
    The result has the dtype and device of `mha`. Its parameters are its own (leaves, trainable), with no memory
    in common with `mha`, which does not change. Dropout does not come along, and `batch_first` says nothing
    about weights: what you return always has the batch first.
    Where torch's masks are boolean, True means forbidden. Yours keep the meaning of this course.

    ValueError if kdim and vdim differ (with both numbers), and if `mha` was made with add_bias_kv or
    add_zero_attn (with this word): such modules cannot be expressed here.
    """
    raise NotImplementedError


def head_contributions(module: MultiHeadAttention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return what each head adds to module(x, None, mask): a tensor (B, H, T, D).

    Its sum over the heads is the output, except for the bias of o_proj, which belongs to no head. Without that
    bias, an entry is what the module would return if only this head existed.
    `module` may come from elsewhere: rely on nothing but n_heads, d_head, d_v and the four projections.
    x (B, T, D) and mask are as in MultiHeadAttention. Gradients flow to x and to the parameters.
    Cost: the FLOPs of the matrix products of one forward pass, and not more. No loops.
    """
    raise NotImplementedError


def prune_heads(module: MultiHeadAttention, keep: Sequence[int]) -> MultiHeadAttention:
    """Return a smaller module that has only the heads of `keep`, in the order of `keep`.

    It computes what `module` would if all other heads added nothing. Widths of heads, width of the context,
    dtype and device stay, and so does the bias of o_proj, if there are biases.
    `module` may come from elsewhere: rely on nothing but n_heads, d_head, d_v and the four projections. It does
    not change. The parameters of the result are its own (leaves, trainable), without memory in common.
    keep: a list, tuple or range of head numbers, 0 to n_heads - 1. ValueError, with `keep` as a list in the
        message, if it is empty, names a head twice, or names one that does not exist (-1 is none).
    """
    raise NotImplementedError


def stack_heads(heads: list[SelfAttention]) -> MultiHeadAttention:
    """Return one module that computes the sum of single heads: head h of it is heads[h].

    The heads are layers like day 17's SelfAttention, each with q_proj, k_proj, v_proj and o_proj of its own (o_proj
    maps to d_out). They may come from elsewhere: rely on nothing but these projections. Dtype and device are those of the heads. The parameters of the result are its own (leaves, trainable),
    without memory in common with the heads, which do not change.
    ValueError if there is no head, if d_out is not d_model (with both numbers), if the heads differ in the shapes
    of their weights (with two shapes that differ), and if some have biases and some have not.
    """
    raise NotImplementedError


def canonicalize(module: MultiHeadAttention) -> MultiHeadAttention:
    """Return an equal module that is the same, parameter by parameter, for all modules of one family.

    Two modules belong to one family if one comes out of the other by steps of these kinds:
        in one head, W_Q -> A W_Q and W_K -> A^-T W_K, with any invertible A (Dh, Dh)
        in one head, W_V -> C W_V and W_O -> W_O C^-1, with any invertible C (Dv, Dv)
        heads change places, each with all that belongs to it
    W_Q, W_K and W_V are the rows of this head, W_O its columns. Biases of q_proj, k_proj and v_proj are moved
    with the rows: b_Q -> A b_Q, b_K -> A^-T b_K, b_V -> C b_V.

    "Equal module": the same outputs for every x, context and mask that is the same for all heads, masks with
    empty rows included. "The same": up to rounding, for generic weights (random ones, say), in float64. Which member
    of the family you return is yours to choose. float32 and float64 keep their dtype, and outputs agree to 1e-3
    in float32.
    `module` may come from elsewhere, does not change and shares no memory with the result, whose parameters are
    leaves and trainable. ValueError if Dh or Dv is larger than D, or than Dc, with the two numbers.
    """
    raise NotImplementedError
