"""Day 24: multi-query attention. One head of keys and values, and how a trained layer gets there.

Letters: `B` batch, `T` query length, `S` key length, `D` model width, `H` query heads, `G` groups or key/value heads
(H is a multiple of G), `Dh` head width, `Dv` value width.
"""

from collections.abc import Sequence

import torch
from day06_training_loop import train_step  # noqa: F401 - yours, if you passed day 6
from day11_optimizers import Adam  # noqa: F401 - yours, if you passed day 11
from day22_kv_cache import KVCache
from torch import Tensor, nn


def mean_pool_heads(w: Tensor, n_heads: int, n_groups: int) -> Tensor:
    """Return the heads of each group averaged into one.

    w: the weight of a projection, (H * Dh, D), or its bias, (H * Dh,): the Dh rows of head 0 first, then those of head 1,
        and so on; any strides
    The result is (G * Dh, D) or (G * Dh,), in the dtype of w. Groups are n_heads / n_groups consecutive heads.
    float16 and bfloat16 are averaged in float32 and rounded once, at the end; float64 stays float64. In groups of 1, 2, 4, ...
    heads that are equal, the result is exactly this head. Gradients flow.
    Raises ValueError with both numbers in the message when n_heads is not a multiple of n_groups or n_groups is below 1, and
    with the shape of w and n_heads when the rows of w are not a multiple of n_heads.
    """
    raise NotImplementedError


def multi_query_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Return softmax(q k^T * scale) v (B, H, T, Dv), where all query heads read the same keys and values.

    q: (B, H, T, Dh), k: (B, S, Dh), v: (B, S, Dv), without an axis for heads; any strides; B, T and S may be 0. v may be a
        view of a part of k.
    mask: boolean, True where a query may attend, broadcastable to (B, H, T, S). None allows everything. A query that
        may attend to nothing gives zeros, and gradients of zero, never NaN.
    scale: None means Dh ** -0.5; 0 is a scale
    The result has the dtype of q. float16 and bfloat16 are computed in float32 and rounded once, at the end; float64 is
    float64 all the way. Scores of 10,000 are fine. Gradients flow to q, k and v.

    Raises ValueError with both shapes in the message when q and k differ in B or Dh, when k and v differ in B or S, and when
    the mask does not broadcast to the scores.
    Cost: exactly two matrix products, each a batch of B matrices (not B * H), of 2 * B * H * T * S * (Dh + Dv) FLOPs
    together. Where q, k and v are float32, and contiguous or the first S places of a contiguous cache, no new tensor is
    larger than the largest of q, the scores and the result.
    """
    raise NotImplementedError


class MultiQueryAttention(nn.Module):
    """Causal self-attention with rotary positions, n_heads query heads and one head of keys and values.

    It is GroupedQueryAttention of day 23 with one group: same weights, same results.
    Four Linear layers without bias, weights (out, in): `q_proj` (H * Dh, D), `k_proj` and `v_proj` (Dh, D), `o_proj`
    (D, H * Dh). The state dict holds these four weights and nothing else. `n_heads`, `n_kv_heads` (1) and `head_dim` are
    kept as attributes.
    head_dim: Dh; None means d_model / n_heads, any even number may be given
    base: of the rotary frequencies, as in `rope_tables` of day 19
    layout: which numbers of a head are turned together: 'interleaved' (`apply_rope`) or 'half' (`apply_rope_half`)
    Raises ValueError, naming the values, when head_dim is None and d_model is not a multiple of n_heads, when head_dim is
    odd, and when the layout is another one.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
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
            the T new tokens: keys (B, 1, T, Dh) that are rotated already and values (B, 1, T, Dh) that are not. It returns
            all S keys and values in their order, the new ones last, and these are what the queries read. Any split of
            a text into chunks gives what the whole text gives at once.
        mask: boolean, True where a query may attend, broadcastable to (B, H, T, S). It can only forbid: a query never
            sees what comes after it in the order of the cache. None forbids nothing more.
        positions: Long (T,) or (B, T), by which queries and new keys are rotated; None means cache.length,
            cache.length + 1, ... (from 0 without a cache). They have no part in who sees whom. A row that is padded on
            the left, with positions of its own and a mask that hides the padding, gives what it gives alone.
        Scores are scaled by Dh ** -0.5. x, mask and positions stay as they are. Gradients flow to x and to all weights.
        Cost: one token after S - 1 cached ones takes exactly its four projections and two products of all H heads with S
        keys, and beside the cache no tensor that is larger than H * S numbers (or H * Dh, or D, if that is more).
        """
        raise NotImplementedError


def convert_checkpoint(
    state: dict[str, Tensor],
    n_heads: int,
    n_kv_heads: int,
    method: str = "mean",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return the state of a model with n_kv_heads key/value heads, made from one with n_heads of them.

    state: of a layer ('k_proj.weight', 'k_proj.bias', 'v_proj.weight', ...) or of a whole model, where such a name may have
        anything in front of it, ended by a dot ('model.layers.3.self_attn.k_proj.weight'). What belongs to a module called
        k_proj or v_proj is converted, weights (H * Dh, D) and biases (H * Dh,) alike. Everything else stays: also what
        only looks similar ('k_proj_norm.weight').
    method: 'mean': each new head is the mean of its group, as in `mean_pool_heads`
        'first': each new head is the first head of its group, copied exactly
        'random': new numbers, normal with mean 0 and the standard deviation of all numbers of the tensor they replace,
            independent from tensor to tensor
    generator: for 'random', which draws from nothing else: two generators in the same state give the same result
    Returns a new dict with the same names in the same order, all dtypes as before. Neither the given dict nor its tensors are
    changed (tensors may be shared).
    Raises ValueError, naming the values, when n_heads is not a multiple of n_kv_heads or n_kv_heads is below 1, when the
    method is another one, and when the method is 'random' and there is no generator.
    """
    raise NotImplementedError


def conversion_error(module: nn.Module, converted: nn.Module, x: Tensor) -> float:
    """Return how far the outputs on x are from what they were, |converted(x) - module(x)| / |module(x)|, as a float.

    The norm is the root of the sum of squares of all numbers of an output. It is taken in float64, so that neither small
    nor large outputs of a half layer get lost. No graph is built, and nothing is changed.
    """
    raise NotImplementedError


def uptrain(
    student: nn.Module, teacher: nn.Module, batches: Sequence[Tensor], steps: int, lr: float, *, train: str = "all"
) -> list[float]:
    """Train the student, in place, to put out what the teacher puts out; return the loss of each step.

    batches: inputs x, at least one, used in their order and again from the start when there are more steps
    Each step takes one batch; its loss is the mean squared difference of student(x) and teacher(x), a float from before
    the update. The update is one of Adam as day 11 has it (betas 0.9 and 0.999, eps 1e-8, no weight decay), with `lr`
    and one state for the whole training.
    train: 'all' trains every parameter of the student, 'kv' those of its modules called k_proj or v_proj, at any depth. All
        others are bit for bit what they were. Gradients that lie in the student from before have no influence.
    The teacher is only asked: its parameters stay, and get no gradients. No parameter changes its requires_grad.
    Raises ValueError for another `train`, and when there is no batch.
    """
    raise NotImplementedError


def tp_cache_bytes(kind: str, n_heads: int, n_kv_heads: int, head_dim: int, latent: int, world: int) -> int:
    """Return how many bytes each rank caches for one token in one layer, when query heads are spread over `world` ranks.

    A rank holds n_heads / world query heads, and of the cache all that these read, in bfloat16 (2 bytes a number):
    kind: 'mha': a key and a value of width head_dim for each query head
        'gqa': the same for n_kv_heads shared heads; when there are more ranks than heads, each rank has a copy of one
        'mqa': the same for a single shared head
        'mla': one vector of `latent` numbers, which keys and values of all heads are made of
    n_kv_heads is looked at for 'gqa' alone (it is at least 1 there), latent for 'mla' alone.
    Raises ValueError, naming the values, when n_heads is not a multiple of world, when for 'gqa' neither of n_kv_heads and
    world is a multiple of the other, and when the kind is another one.
    """
    raise NotImplementedError


def optimal_shared_key(w_q: Tensor, w_k: Tensor, x_cal: Tensor, n_groups: int) -> Tensor:
    """Return the shared keys (G, Dh, D) that change the scores on x_cal least.

    w_q, w_k: (H, Dh, D), the queries and keys of head h are x @ w[h].T; x_cal: (N, D), tokens
    Groups are H / n_groups consecutive heads. A score is the product of a query with a key, without rotation, scale or
    mask. The error of a group is the sum over its heads h, and over all pairs of tokens, of the squared difference
    between the score of w_q[h] with w_k[h] and that of w_q[h] with the shared key. The result has the smallest error
    there is. Where several have it, any of them will do, but all numbers are finite.
    Computed in float64, returned in the dtype of w_k.
    Raises ValueError, with both shapes, when w_q and w_k differ in shape or x_cal has another width, and with both numbers
    when H is not a multiple of n_groups or n_groups is below 1.
    """
    raise NotImplementedError
