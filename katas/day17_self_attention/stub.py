"""Day 17: one learned head, and the checks that it leaks nothing. `kata lesson` explains, `kata check` tells where you are.

x is (B, T, D), a context (B, S, Dc), a head has width Dh. A mask is boolean, and True means: this query may attend
to this key.

From day 16, where a mask of None allows every key:
    attention(q, k, v, mask=None, scale=None) returns a pair, the mixtures (B, T, Dv) and the weights (B, T, S);
        its mask broadcasts to the weights
    causal_mask(tq, tk, *, offset=None, device=None) returns a mask (tq, tk)
    combine_masks(*masks) returns the mask that allows what all of them allow, or None if all are None
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from day08_linear_layers import Linear  # noqa: F401 - yours, if you passed day 8
from day16_scaled_dot_product import attention, causal_mask, combine_masks  # noqa: F401 - yours, if you passed day 16
from torch import Tensor, nn


def segment_mask(segments: Tensor) -> Tensor:
    """Return the boolean mask (B, 1, T, T) in which two places see each other if their numbers are equal.

    segments: integers (B, T), the number of the document that each place of a packed row belongs to. The numbers
        may come in any order and need not be neighbors. T and B may be 0.
    The mask is on the device of `segments`. No loops.
    """
    raise NotImplementedError


def padding_mask(lengths: Tensor, tq: int) -> Tensor:
    """Return the boolean mask (B, 1, tq, S) in which every query of row b sees the keys j < lengths[b].

    lengths: integers (B,); the number of keys S is the largest of them, and 0 if B is 0. A length may be 0.
    The mask is on the device of `lengths`. No loops.
    """
    raise NotImplementedError


class SelfAttention(nn.Module):
    """One head of attention from a sequence to itself.

    q_proj(x), k_proj(x) and v_proj(x) go into `attention`; o_proj of the mixtures, the first of its pair, is the output.
    The four projections are linear layers with these names, so that the state dict has `q_proj.weight` (Dh, D),
    `k_proj.weight` (Dh, D), `v_proj.weight` (Dh, D) and `o_proj.weight` (d_out, Dh), and with bias=True the four
    biases of their outputs. d_head None means d_model, d_out None means d_model.
    """

    def __init__(self, d_model: int, d_head: int | None = None, d_out: int | None = None, bias: bool = False):
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        """Map x (B, T, D) to (B, T, d_out).

        mask: (T, T), (B, T, T) or (B, 1, T, T), or anything that broadcasts to one of these; None = every key
        causal: in addition, place i sees the places up to i only. Masks and causality hold together.
        The scale is Dh ** -0.5. A place that sees nothing gets o_proj of zeros. Neither x nor mask is changed,
        and gradients flow to x and to all parameters. A wrong width of x raises ValueError with two shapes in its
        message: that of x and that of q_proj.weight.
        Cost: six matrix products, four of projections and two of attention.
        """
        raise NotImplementedError


class CrossAttention(nn.Module):
    """One head of attention from x (B, T, D) to a context (B, S, Dc): queries from x, keys and values from the context.

    `q_proj.weight` (Dh, D), `k_proj.weight` (Dh, Dc), `v_proj.weight` (Dh, Dc), `o_proj.weight` (D, Dh), no biases.
    """

    def __init__(self, d_model: int, d_context: int, d_head: int):
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """Return (B, T, D).

        context_mask: (B, S), True where the context may be read; None = everywhere. A row with nothing to read gives
            zeros. What hidden context holds changes nothing, as long as it is finite.
        None of the inputs is changed. Cost: six matrix products.
        ValueError, with the shapes of x and context in its message, when these differ in B; with the shapes of
        context_mask and context (or (B, S) for the latter), when context_mask is not (B, S).
        """
        raise NotImplementedError


def future_leak(module: Callable[[Tensor], Tensor], x: Tensor, t: int) -> float:
    """Return the largest |d out[:, :t+1] / d x[:, t+1:]| over all pairs of numbers, where out = module(x).

    x: (B, T, D) in a float dtype, module: any callable (B, T, D) -> (B, T, ...), 0 <= t < T
    Returns a float: exactly 0.0 if no output up to place t depends on an input after it, also when t is the last
    place. Each derivative counts by itself: they are not added up. Derivatives are exact, not differences.
    Works inside torch.no_grad(), leaves x (its `requires_grad` and `grad`) alone, and the `grad` of parameters too.
    """
    raise NotImplementedError


def masked_self_attention(module: SelfAttention, x: Tensor, lengths: Tensor, *, causal: bool) -> Tensor:
    """Return module(x, causal=causal) for a padded batch, (B, T, d_out): row b has lengths[b] places, the rest is padding.

    What the valid places give is what the row gives alone, without its padding: neither the content of the padding
    (NaN and infinity included) nor its amount changes it, and no gradient reaches the padding. Outputs of padding are
    zeros. A length may be 0; T may be larger than all lengths.
    module: called as module(x, mask, causal=...), with a mask as `SelfAttention` takes it. Such a mask has T keys, one
        for each place of x, also when every row is shorter than T.
    lengths: integers (B,). Another shape raises ValueError with the shapes of lengths and x in its message.
    """
    raise NotImplementedError


def window_mask(
    tq: int, tk: int, window: int, *, offset: int | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Return the boolean mask (tq, tk) in which query i sees the keys i + offset - window < j <= i + offset.

    These are its own place and the window - 1 places before it: window 1 is its own place alone, and a window of all
    places is the causal mask. Without an offset (None) it is tk - tq, so that the last query stands at the last key. A
    given offset counts as it is, also when it is 0 or negative. The mask is on `device`. No loops.
    """
    raise NotImplementedError


def prefix_mask(t: int, prefix: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return the boolean mask (t, t) in which place i sees the places j <= i, and those with j < prefix.

    prefix 0 is the causal mask, prefix >= t allows everything. The mask is on `device`. No loops.
    """
    raise NotImplementedError


def fuse_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of `SelfAttention` with q_proj, k_proj and v_proj fused into one `qkv_proj`.

    `qkv_proj.weight` is (3 * Dh, D): the rows of q, then of k, then of v; `qkv_proj.bias` (3 * Dh,) likewise, if there
    are biases. All other entries are kept as they are. `state` is not changed.
    """
    raise NotImplementedError


def split_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with `qkv_proj` taken apart into `q_proj`, `k_proj` and `v_proj`: the exact inverse of `fuse_qkv`.

    All other entries are kept as they are. The parts share no memory with the fused matrix; `state` is not changed.
    """
    raise NotImplementedError


# The task linear_attention: one function in two forms, `parallel` and `recurrent`.


def parallel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal linear attention (..., T, Dv): out_i = sum_j w_ij v_j / sum_j w_ij over j <= i.

    w_ij = f(q_i) . f(k_j) with f(x) = elu(x) + 1, without any scale. q, k: (..., T, D), v: (..., T, Dv), all with the
    same leading axes. The dtype is kept. T may be 0.
    """
    raise NotImplementedError


def recurrent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the same as `parallel`, place by place: to 1e-6 in float32, with gradients to q, k and v.

    What is carried from place to place is a matrix (..., D, Dv) and a vector (..., D), however long the sequence is.
    Cost: no tensor holds more than T * (D + Dv) numbers (and D * Dv) per entry of the leading axes.
    """
    raise NotImplementedError
