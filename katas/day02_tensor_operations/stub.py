"""Day 2: broadcasting and reductions that stay finite."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def broadcast_shape(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that tensors of shapes `a` and `b` have after broadcasting, as a tuple.

    Shapes are lined up at their last axes, and a shape that is too short behaves as if it had 1s in front.
    Two sizes fit when they are equal or when one of them is 1, which then takes the other's size; that
    other size may be 0.
    `()` is the shape of a single number and fits everything.
    Sizes that do not fit raise ValueError with both shapes in the message.

    The answer is predicted: no tensor is made, so sizes like (10**9, 1) and (1, 10**9) are fine.
    """
    raise NotImplementedError


def column_mse(pred: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference in each column: pred (N, D), target (N, D) -> (D,).

    The mean runs over the N rows. The dtype is that of the inputs.
    The shapes must be equal: anything else, also what would broadcast, such as (N, 1) and (N,), raises
    ValueError with both shapes in the message.
    """
    raise NotImplementedError


def standardize(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Shift and scale each row of x (..., D), its last axis, to mean 0 and variance 1; same shape and dtype.

    Each entry becomes (entry - mean) / sqrt(variance + eps), with the biased variance (it divides by D).
    So a row of equal entries gives zeros, and D = 1 gives zeros. No rows, shape (0, D), give no rows.

    In float32 a row around 10,000 with a spread of 1 is right to 0.005.
    float16 and bfloat16 inputs are computed in float32 and rounded once at the end; float64 stays float64.
    Gradients flow through mean and variance too.
    """
    raise NotImplementedError


def logsumexp(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """Return log(sum(exp(x))) over axis `dim` (which may be negative), in the dtype of x.

    The axis disappears from the shape, or stays with size 1 if `keepdim` is true.

    It is finite for entries of any finite size (10,000 and -10,000 as well), whatever the other rows hold.
    A row of -inf gives -inf, a row with +inf and no NaN gives +inf, and an axis of size 0 gives -inf, the log
    of an empty sum.
    float16 and bfloat16 inputs are computed in float32 and rounded once at the end; float64 stays float64.
    Where the result is finite, its gradient with respect to x is the softmax of x.
    """
    raise NotImplementedError


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Return exp(x) / sum(exp(x)) with the sum over axis `dim`; same shape and dtype as x.

    It is right for entries of any finite size, whatever the other rows hold: in float32, a row of whole
    numbers and the same row plus 10,000 give the same weights to 1e-5. Entries of -inf beside finite ones get
    exactly 0.
    An axis of size 0, or no rows, gives an empty result.
    float16 and bfloat16 inputs are computed in float32 and rounded once at the end; float64 stays float64.
    Gradients are those of torch.softmax. A tensor without axes, shape (), raises ValueError.
    """
    raise NotImplementedError


def masked_softmax(x: Tensor, mask: Tensor | None, dim: int = -1) -> Tensor:
    """Return the softmax along `dim` over the entries where the boolean `mask` is True; shape and dtype of x.

    Entries where `mask` is False get exactly 0 and no gradient, and whatever x holds there (10,000, inf, NaN)
    has no influence on the rest, neither on values nor on gradients.
    A row in which nothing is allowed gives zeros and a zero gradient, never NaN. An entry that is allowed
    counts however low it is, and -inf beside finite entries gets 0. `mask=None` allows everything.

    `mask` broadcasts to the shape of x. If it does not (also if it is larger than x), ValueError with both
    shapes. x has at least one axis; an axis of size 0, or no rows, gives an empty result.
    float16 and bfloat16 inputs are computed in float32 and rounded once at the end; float64 stays float64.
    Cost: for float32, never more than four tensors of the size of x at one time, beside x, a few masks and a
    few numbers per row.
    """
    raise NotImplementedError


def masked_mean(
    x: Tensor, mask: Tensor | None, dim: int | tuple[int, ...] | None = None, keepdim: bool = False
) -> Tensor:
    """Return the mean over `dim` of the entries of x where the boolean `mask` is True; dtype of x.

    `dim` is one axis, a tuple of axes, or None for all; axes may be negative. These axes disappear, or stay
    with size 1 if `keepdim` is true (with `dim=None`, all of them). `mask=None` keeps everything.

    `mask` broadcasts to the shape of x, and a True counts once for each entry of x that it is stretched to.
    If it does not broadcast to x (also if it is larger than x), ValueError with both shapes.
    Where nothing is kept, or there is nothing at all, the mean is 0, and its gradient is 0.
    Whatever x holds where `mask` is False (inf and NaN as well) has no influence, and its gradient is 0.
    float16 and bfloat16 inputs are computed in float32 and rounded once at the end; float64 stays float64.
    """
    raise NotImplementedError


def pairwise_sq_dist(a: Tensor, b: Tensor) -> Tensor:
    """Return all squared Euclidean distances between rows: a (N, D), b (M, D) -> (N, M), dtype of a.

    No entry is ever negative, also where two rows are the same or nearly so. N and M may be 0.
    Rounding errors may be as large as those of |a|^2 + |b|^2, as in the expanded square.
    float16 and bfloat16 inputs are computed in float32 and rounded once at the end; float64 stays float64.
    Gradients flow to both. Different widths D raise ValueError with both shapes in the message.
    Cost: never more than four tensors of the size of the result at one time, beside some of the size of the
    inputs; so there is no room for one of shape (N, M, D).
    """
    raise NotImplementedError


def chunked_logsumexp(chunks: Iterable[Tensor]) -> Tensor:
    """Return logsumexp over the last axis of all chunks together: each is (..., n_i), the result is (...).

    The chunks come from any iterable, maybe a generator: it is read once, from front to back, and no more is
    kept than a few tensors of the size of one chunk, however many come.
    The result is that of one long row: the order of the chunks and the places of the cuts do not matter, and
    chunks of size n_i = 0 or full of -inf change nothing. If all are like that, the result is -inf; if there
    is +inf and no NaN anywhere, it is +inf.
    Rounding errors do not grow with the number of chunks: 400 chunks of the single value 100,000 in float32
    give 100,000 + log(400) to 0.02.
    float16 and bfloat16 chunks are computed in float32 and rounded once, after the last; float64 stays
    float64.
    The chunks share all sizes but the last, else ValueError with both leading shapes (...) in the message;
    no chunk at all is a ValueError too.
    """
    raise NotImplementedError
