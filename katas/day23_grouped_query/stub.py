"""Day 23: grouped-query attention. Fewer keys, same queries.

Letters: `B` batch, `T` query length, `S` key length, `D` model width, `H` query heads, `G` key/value heads (H is a
multiple of G), `Dh` head width, `Dv` value width. The H / G query heads that share a key/value head are a group.
"""

from day22_kv_cache import KVCache
from torch import Tensor, nn


def group_of(n_heads: int, n_kv_heads: int) -> Tensor:
    """Return, for each of the n_heads query heads, the number of the key/value head that it reads.

    A LongTensor (n_heads,) on the CPU. Groups are made of consecutive query heads: the first n_heads / n_kv_heads of
    them read head 0, as many after them read head 1, and so on.
    Raises ValueError with both numbers in the message when n_heads is not a multiple of n_kv_heads, or n_kv_heads is
    below 1.
    """
    raise NotImplementedError


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    """Return (B, G * n_rep, T, Dh): head h of the result is head h // n_rep of x (B, G, T, Dh).

    n_rep is at least 1. Any dtype and any strides; any size of x may be 0; gradients flow.
    Cost: with n_rep = 1 nothing is copied: the result is x or a view of it. Otherwise no tensor is made that is larger
    than the result, and little memory beside the result.
    """
    raise NotImplementedError


def grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Return softmax(q k^T * scale) v (B, H, T, Dv), where query head h reads key/value head h // (H / G).

    q: (B, H, T, Dh), k: (B, G, S, Dh), v: (B, G, S, Dv); any strides; B, T and S may be 0
    mask: boolean, True where a query may attend, broadcastable to (B, H, T, S): one for each *query* head, not for each
        group. None allows everything. A query that may attend to nothing gives zeros, and gradients of zero, never NaN.
    scale: None means Dh ** -0.5; 0 is a scale
    The result has the dtype of q. float16 and bfloat16 are computed in float32 and rounded once, at the end; float64 is
    float64 all the way. Scores of 10,000 are fine. Gradients flow to q, k and v.

    Raises ValueError with both shapes in the message when q and k differ in B or Dh, when k and v differ in B, G or S,
    when H is not a multiple of G (or G is 0), and when the mask does not broadcast to the scores.
    Cost: exactly two matrix products, of 2 * B * H * T * S * (Dh + Dv) FLOPs together. k and v are never repeated in
    memory: no new tensor is larger than the largest of q, k, v, the scores and the result. And where k and v are float32
    and contiguous, or the first S places of such a cache (B, G, max_len, Dh), they are read as they lie: no new tensor
    is larger than the largest of q, the scores and the result, and all new tensors together take at most eight times
    the memory of the scores and four times that of q and the result.
    """
    raise NotImplementedError


class GroupedQueryAttention(nn.Module):
    """Causal self-attention with rotary positions, n_heads query heads and n_kv_heads heads of keys and values.

    Four Linear layers without bias, weights (out, in): `q_proj` (H * Dh, D), `k_proj` and `v_proj` (G * Dh, D), `o_proj`
    (D, H * Dh). The state dict holds these four weights and nothing else. Rows of head 0 come first, then those of head
    1, and so on. `n_heads`, `n_kv_heads` and `head_dim` are kept as attributes.
    head_dim: Dh; None means d_model / n_heads, any even number may be given
    base: of the rotary frequencies, as in `rope_tables`
    layout: which numbers of a head are turned together: 'interleaved' (0 and 1, 2 and 3, ..., as `apply_rope` does) or
        'half' (0 and Dh/2, 1 and Dh/2 + 1, ..., as `apply_rope_half` does)
    Raises ValueError, naming the values, when n_heads is not a multiple of n_kv_heads, when head_dim is None and d_model is
    not a multiple of n_heads, when head_dim is odd, and when the layout is another one.
    """

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
        raise NotImplementedError

    def forward(
        self, x: Tensor, *, cache: KVCache | None = None, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Map x (B, T, D) to (B, T, D), in the dtype of x.

        cache: of earlier tokens, or None. Of it only `length` and `update(k, v)` are used, update once per call, with
            the T new tokens: keys (B, G, T, Dh) that are rotated already and values (B, G, T, Dh) that are not. It returns
            all S keys and values in their order, the new ones last, and these are what the queries read. Any split of
            a text into chunks gives what the whole text gives at once.
        mask: boolean, True where a query may attend, broadcastable to (B, H, T, S). It can only forbid: a query never
            sees what comes after it in the order of the cache, whatever the mask says. None forbids nothing more.
        positions: Long (T,) or (B, T), by which queries and new keys are rotated; None means cache.length,
            cache.length + 1, ... (from 0 without a cache). They have no part in who sees whom. So rows of different
            lengths, padded on the left, work: with positions of their own and a mask that hides the padding, each row
            gives what it gives alone, and nothing becomes NaN.
        Scores are scaled by Dh ** -0.5. x, mask and positions stay as they are. Gradients flow to x and to all weights.
        Cost: one token after S - 1 cached ones takes exactly its four projections and two products of all H heads with S
        keys, and beside the cache no tensor that is larger than H * S numbers (or H * Dh, or D, if that is more).
        """
        raise NotImplementedError


def gqa_costs(
    d_model: int, n_heads: int, n_kv_heads: int, head_dim: int, length: int, dtype_bytes: int
) -> dict[str, int]:
    """Return what one GroupedQueryAttention costs, as a dict of four ints.

    params: the numbers in its four weights
    cache_bytes_per_token: of the keys and values of one token of one sequence, dtype_bytes for each number
    score_flops: of the two matrix products of attention (queries with keys, weights with values) for one new token that
        comes after `length` cached ones, and sees itself too
    decode_flops: of the whole layer for that token: its projections and score_flops
    A multiplication with its addition counts as two. Softmax and rotation are not counted.
    """
    raise NotImplementedError


def gqa_equivalent_mha(state: dict[str, Tensor], n_heads: int, n_kv_heads: int) -> dict[str, Tensor]:
    """Return the state of a layer with n_heads key/value heads that computes what this one computes.

    state: 'q_proj.weight' (H * Dh, D), 'k_proj.weight' and 'v_proj.weight' (G * Dh, D), 'o_proj.weight' (D, H * Dh), and
        perhaps 'q_proj.bias', 'k_proj.bias' and 'v_proj.bias', with a number for each row of their weights
    Returns a new dict with the same names. What belongs to keys and values has H * Dh rows; the rest is as it was. The
    numbers are copied, never computed with, and dtypes stay. The given state is not changed (tensors may be shared).
    Raises ValueError with both numbers in the message when n_heads is not a multiple of n_kv_heads.
    """
    raise NotImplementedError


def shard(state: dict[str, Tensor], n_heads: int, n_kv_heads: int, world: int, rank: int) -> dict[str, Tensor]:
    """Return the part of a layer that rank `rank` of `world` ranks holds when its heads are spread over them.

    state: as for `gqa_equivalent_mha`
    Rank r holds the r-th n_heads / world consecutive query heads, and the key/value heads that these read, in order,
    and nothing else: n_kv_heads / world heads of its own while there are enough, and from there on one, which several
    ranks hold a copy of. Of o_proj it holds what belongs to its query heads. So a GroupedQueryAttention with these
    numbers of heads (and the head_dim of the whole) takes the part as its state, and the outputs of all ranks for the
    same x add up to the output of the whole layer.
    Returns a new dict with the same names. Dtypes stay, and the given state is not changed (tensors may be shared).
    Raises ValueError, naming the numbers, when n_heads is not a multiple of world, when neither of n_kv_heads and world
    is a multiple of the other, when n_heads is not a multiple of n_kv_heads, and when rank is not one of 0 ... world - 1.
    """
    raise NotImplementedError


def best_grouping(module: GroupedQueryAttention, x: Tensor, n_kv_heads: int) -> Tensor:
    """Return the order of the heads in which consecutive groups have the most similar keys and values on x.

    module: a layer that has as many key/value heads as query heads, H; x: (B, T, D)
    n_kv_heads: how many groups of H / n_kv_heads heads to make
    The cost of a group is the squared distance of its heads from their mean, summed over the numbers of their keys
    k_proj(x) and their values v_proj(x), over all tokens of x. (Rotation turns all heads of a token alike, so it changes no
    distance.) The cost of a grouping is the sum over its groups, and the order that is returned has the smallest cost
    of all groupings. H is small: for 8 heads, trying all groupings is a matter of milliseconds.
    Keys and values of a half layer are compared in float32 at least: the squares would not fit.
    Returns a LongTensor (H,) on the device of x: place i holds the number of the head that goes there. Inside a group
    heads ascend, and groups ascend by their first head. The module is not changed.
    Raises ValueError with both numbers in the message when H is not a multiple of n_kv_heads.
    """
    raise NotImplementedError
