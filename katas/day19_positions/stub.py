"""Day 19: positions. `kata lesson` explains, `kata check` tells you where you are.

Positions are absolute and handed in: a LongTensor (T,), or (B, T) where each row of the batch stands somewhere
else. `...` are any number of axes, also none. D is even, and a pair are two columns that turn together.
"""

from __future__ import annotations

import torch
from day16_scaled_dot_product import attention  # noqa: F401 - yours, if you passed day 16
from torch import Tensor, nn


def sinusoidal(positions: Tensor, dim: int, base: float = 10000.0) -> Tensor:
    """Return (..., dim) for positions (...): column 2i is sin(p * w_i), column 2i + 1 is cos(p * w_i).

    w_i = base ** (-2i / dim): 1 for the first pair of columns, and slower from pair to pair.
    Positions may have any shape and any dtype, and need not be whole numbers. The result is float32, or float64 if
    the positions are; torch's default dtype has no part in it. Angles are computed in float64: a float32 result is
    exact to 1e-6 for position 100,000, too.
    An odd dim raises ValueError with dim in the message. No loops.
    """
    raise NotImplementedError


class LearnedPositions(nn.Module):
    """A table of trained rows, the parameter `weight` (max_len, dim): row p belongs to position p.

    It starts with random values from a normal distribution with mean 0 and standard deviation 0.02, drawn from
    torch's global random state.
    """

    def __init__(self, max_len: int, dim: int):
        raise NotImplementedError

    def forward(self, x: Tensor, *, offset: int = 0) -> Tensor:
        """Return x (..., T, dim) plus the row of each place; x[..., 0, :] stands at position `offset`.

        x does not change and is not scaled; the result has its dtype, and half inputs are rounded after the sum.
        T may be 0. Another width than dim raises ValueError with the shapes of x and weight. A position outside of
        0 ... max_len - 1 raises IndexError, a negative one as well; with T = 0 an offset of up to max_len is fine.
        """
        raise NotImplementedError


def rope_tables(
    positions: Tensor, dim: int, base: float = 10000.0, *, inv_freq: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (cos, sin), each (..., dim/2) for positions (...): of the angle p * w_i, one column per pair.

    w_i = base ** (-2i / dim), or inv_freq[i] if inv_freq (dim/2,) is given, of any floating dtype; base is unused then.
    Both are float32, or float64 if the positions are, whatever the dtype of inv_freq and torch's default dtype;
    angles are computed in that precision or a better one. Positions may have any shape and need not be whole.
    An odd dim raises ValueError with dim in the message, an inv_freq that is not (dim/2,) with its shape and dim.
    Cost: no tensor has more elements than both tables together.
    No loops.
    """
    raise NotImplementedError


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (..., T, D) with each pair (x0, x1), (x2, x3), ... turned by its angle.

    A pair (a, b) becomes (a cos - b sin, a sin + b cos), and stays where it was.
    cos, sin: (T, D/2), the same for all leading axes; or with axes in front, which are the *first* axes of x, equal
        or 1. So (B, T, D/2) has one table per row of the batch, for x (B, T, D) as well as for x (B, H, T, D),
        where all heads of a row turn alike. B, H and T may be equal; any axis may be 0.
    The result has the shape and the dtype of x. Half inputs are turned in the (float32) precision of the tables and
    rounded once; float64 is not narrowed. Gradients flow to x, cos and sin. Strides are arbitrary.
    Raises ValueError when the tables do not fit x, with the shapes of x and cos in the message (a table for one
    position does not fit five), and when cos and sin differ in shape, with both.
    Cost: for float32, at most eight calls that compute, and no tensor with more elements than x.
    """
    raise NotImplementedError


def rotary_attention(
    q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor, key_positions: Tensor, base: float = 10000.0
) -> Tensor:
    """Return the output (B, H, T, Dv) of causal attention with rotary positions.

    q: (B, H, T, D), k: (B, H, S, D), v: (B, H, S, Dv)
    query_positions: (T,) or (B, T); key_positions: (S,) or (B, S); in any order, with gaps, whole numbers or float64
    Queries and keys are turned by where they stand, as `apply_rope` does with `rope_tables` of width D and this base.
    A query at position p may attend to the keys at positions up to p, its own included, wherever these are stored;
    one that may attend to none gets zeros. The scale is D ** -0.5. The result has the dtype of q, and only
    differences of positions count: all of them may be shifted together.
    Positions that are not one per query or key raise ValueError with the shape of that q or k in the message.
    """
    raise NotImplementedError


def apply_rope_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return what `apply_rope` does with other pairs: x_i turns together with x_{i + D/2}, for i < D/2.

    Column i of the tables belongs to this pair. Everything else is as in `apply_rope`: alignment, dtypes, errors.
    """
    raise NotImplementedError


def interleaved_to_half(w: Tensor, n_heads: int) -> Tensor:
    """Return w (H*D, I) with the rows of each head in a new order, so that neighbors become halves.

    w: the weight of a query or key projection whose H heads are turned by `apply_rope`; or its bias (H*D,)
    With the new weights and `apply_rope_half`, the scores of every query and key are what they were: each head holds
    the same turned numbers, first those of even columns, then those of odd ones. The dtype stays.
    Rows that are not n_heads times an even width raise ValueError with the shape of w and n_heads in the message.
    """
    raise NotImplementedError


def alibi_bias(
    n_heads: int, tq: int, tk: int, *, offset: int | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Return the bias (H, tq, tk) in float32 on `device`: minus the slope of the head times |query - key|.

    Query i stands at i + offset and key j at j; None means tk - tq, so the last query stands at the last key.
    The bias is 0 where both stand at the same place; it falls on either side (what lies in the future is hidden by
    a mask, not by a bias). Either size may be 0.
    Slopes: for n = 1, 2, 4, 8, ... heads, 2 ** (-8 / n) and its powers up to the n-th: 1/2, 1/4, ..., 1/256 for 8.
    For any other number of heads: with n the largest power of two below it, those of n heads, and then the first,
    third, fifth, ... slope of 2n heads until there are enough.
    """
    raise NotImplementedError


def relative_bucket(rel: Tensor, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True) -> Tensor:
    """Return the bucket (a LongTensor of the shape of rel) of each rel = key position - query position.

    bidirectional: keys that come later (rel > 0) use the upper half of the buckets, all others the lower half, and
        each half counts |rel|. Otherwise all buckets count how far back a key lies, and keys that come later are
        in bucket 0, as rel = 0 is.
    Of the n buckets of such a count, the first n // 2 hold one distance each: 0, 1, 2, ... With e = n // 2, the others
    grow with the logarithm: distance d is in bucket e + floor(log(d / e) / log(max_distance / e) * (n - e)), and
    whatever would be beyond the last bucket is in the last. The result does not depend on torch's default dtype.
    """
    raise NotImplementedError


class RelativeBias(nn.Module):
    """A trained bias for the scores, the parameter `weight` (num_buckets, n_heads), which starts as zeros.

    The other arguments are those of `relative_bucket`.
    """

    def __init__(self, n_heads: int, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True):
        raise NotImplementedError

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Return (..., H, T, S) for query positions (..., T) and key positions (..., S): the weight of each bucket."""
        raise NotImplementedError


def ntk_base(base: float, dim: int, factor: float) -> float:
    """Return another base, as a float, with which the slowest of the dim/2 pairs turns `factor` times slower.

    Frequencies are those of `rope_tables`. The first pair turns as before, and those between are slowed down more the
    slower they are. An odd dim, or one with fewer than two pairs, raises ValueError with dim in the message.
    """
    raise NotImplementedError


def local_resolution(dim: int, base: float = 10000.0, *, interpolation: float = 1.0) -> float:
    """Return how far a step from one position to the next moves a pair of length 1, averaged over the pairs.

    Before anything else, positions are divided by `interpolation`: that is the plain way to squeeze a long text into
    the range of positions that a model was trained on. The distance is the length of the difference between the
    pair at both positions (a straight line, not the arc). Any even dim; the result is a float, exact to 1e-6.
    """
    raise NotImplementedError
