"""Day 16: scaled dot-product attention. `kata lesson` explains, `kata check` tells you where you are.

Tq queries of width D look at Tk keys of width D; each key has a value of width Dv. `...` are any number of
leading axes, often (B, H). A mask is boolean, and True means: this query may attend to this key.
"""

from __future__ import annotations

import torch
from day02_tensor_operations import broadcast_shape, masked_softmax  # noqa: F401 - yours, if you passed day 2
from torch import Tensor


def causal_mask(tq: int, tk: int, *, offset: int | None = None, device: torch.device | str | None = None) -> Tensor:
    """Return the boolean mask (tq, tk) in which query i may attend to the keys j <= i + offset.

    offset: how many keys are older than the first query. `None` means tk - tq: the queries are the last tq
        of the tk places, so the last query sees every key, and a single query sees all. 0 gives the lower
        triangle that starts at the top left. It may be negative, or larger than tk.
    A query that comes before every key gets an empty row, which happens by default when tq > tk. Either size
    may be 0.
    The mask is on `device`. No loops.
    """
    raise NotImplementedError


def combine_masks(*masks: Tensor | None) -> Tensor | None:
    """Return the boolean mask that allows exactly what all `masks` allow; they broadcast together.

    None allows everything and so has no say. If all masks are None, or there is none, the result is None.
    The masks may be of any number of axes, in any order, and none of them is changed.
    Two shapes that do not broadcast raise ValueError with both in the message.
    """
    raise NotImplementedError


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out, weights): weights = softmax(q k^T * scale) over the allowed keys, out = weights v.

    q: (..., Tq, D), k: (..., Tk, D), v: (..., Tk, Dv); leading axes broadcast, strides are arbitrary
    mask: boolean, broadcastable to the scores (..., Tq, Tk), True = may attend; None = every key
    scale: what the scores are multiplied by, 0 as well; None means D ** -0.5
    Returns out (..., Tq, Dv) and weights (..., Tq, Tk), in the dtype of q.

    Weights: those of one query sum to 1, those of hidden keys are exactly 0, and what (finite) numbers a
    hidden key or its value holds changes nothing. An allowed key counts however low its score is. Scores of
    10,000 and more are fine.
    Nothing allowed: a query that may attend to no key, also because Tk = 0, gets zeros in out and weights
    and sends back zero gradients, never NaN. Tq and leading axes may be 0, too.
    Precision: for float16 and bfloat16, scores and softmax are computed in float32, so scores of 256 and 257
    stay apart and 100,000 does not overflow. float64 is float64 all the way.
    Dropout: with dropout_p > 0 each weight by itself becomes 0 with this probability, the others are divided
    by 1 - dropout_p, and the weights returned are these: out = weights v still holds. With 1, all is 0.
    The random numbers come from `generator` (which may live on another device than q), and from torch's global
    one only where that is None; with dropout_p = 0 none are drawn.
    Gradients flow to q, k and v.

    Raises ValueError with both shapes when q and k differ in D, when k and v differ in Tk, and when the mask
    does not broadcast to the scores.
    Cost: exactly two matrix products of 2*Tq*Tk*(D + Dv) FLOPs together for each entry of the leading axes;
    without a mask, in float32, no more than four tensors of the size of the scores at one time, beside some
    of the size of q, k, v and out.
    """
    raise NotImplementedError


def attention_grads(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv): the gradients of (dout * out).sum() at q, k and v, where out = attention(q, k, v, ...)[0].

    dout: (..., Tq, Dv); q: (..., Tq, D), k: (..., Tk, D), v: (..., Tk, Dv), all with the same leading axes
    weights: (..., Tq, Tk), as `attention` returned them, without dropout; what a mask hid is 0 in there
    scale: the one that `attention` was given; None means D ** -0.5
    Returns tensors with the shapes and the dtype of q, k and v.

    By hand: autograd is not used. A query whose weights are all 0 gets a zero gradient and sends none. Any
    size may be 0. float16 and bfloat16 are computed in float32 and rounded once at the end; float64 stays
    float64.
    Raises ValueError when dout or weights has another shape than the one above, with that shape and the one
    that is needed.
    Cost: exactly four matrix products.
    """
    raise NotImplementedError


def attention_flops(b: int, h: int, tq: int, tk: int, d: int, dv: int) -> int:
    """Return how many floating-point operations the two matrix products of `attention` take.

    b * h leading entries, tq queries and tk keys of width d, values of width dv. A multiplication and the
    addition that follows it are two operations. Scale, softmax and mask are not counted, and a mask saves
    nothing. It is the number that the meter of `kata check` finds, as an int.
    """
    raise NotImplementedError


def logit_spread(d: int, n: int, scale: float | None, *, generator: torch.Generator) -> tuple[float, float]:
    """Return (std, entropy) of the scores between n random queries and n random keys of width d, as floats.

    First q (n, d) is drawn, then k (n, d): two calls of torch.randn, float32, from `generator`, which lives on
    the CPU. No other random numbers are drawn.
    The scores are q k^T * scale, an (n, n) table; scale None means d ** -0.5.
    std: the root of the mean squared deviation from their mean, over all n * n scores (a single one gives 0)
    entropy: of the softmax weights of each query, -sum(p * log(p)) with the natural logarithm, averaged over
        the queries. A weight of 0 contributes 0, so the entropy is never NaN, also when the scores are huge.
    """
    raise NotImplementedError


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, block_q: int = 64, block_k: int = 64
) -> Tensor:
    """Return the out of attention(q, k, v) without ever holding the (Tq, Tk) table of scores.

    q: (..., Tq, D), k: (..., Tk, D), v: (..., Tk, Dv), all with the same leading axes
    causal: query i sees the keys j <= i + Tk - Tq, as in `causal_mask`; a query that sees none gets zeros
    block_q, block_k: how many queries meet how many keys at one time; they need not divide Tq and Tk
    Returns out (..., Tq, Dv) in the dtype of q: that of `attention` to 1e-6 (for ordinary inputs in float32),
    whatever the blocks are. Scores of 10,000 and more are fine; any size may be 0.

    Backward: gradients of q, k and v as those of `attention`, zeros for a query that sees nothing.
    float16 and bfloat16 are computed in float32; float64 stays float64.
    Raises ValueError as `attention` does when q, k and v do not fit.
    Cost: at no moment, forward or backward, more than eight blocks of scores (..., block_q, block_k), two
    tensors of the size of each of q, k, v and out, and sixteen numbers per query. What is saved for backward is
    no more than q, k, v, out and one number per query. Blocks that causality hides altogether are never
    multiplied: forward takes the FLOPs of the two products of the other blocks, and backward at most seven
    products for each of those.
    """
    raise NotImplementedError
