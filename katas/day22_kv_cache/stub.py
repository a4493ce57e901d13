"""Day 22: keys and values that are computed once. `kata lesson` explains, `kata check` tells you where you are.

B rows, Hkv heads of keys and values, T new tokens, L tokens in all. k is (B, Hkv, T, D), v is (B, Hkv, T, Dv).
A position is the place of a token in its text, counted from 0, whichever chunk it came in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from day01_tensor_basics import merge_heads, split_heads  # noqa: F401 - yours, if you passed day 1
from day08_linear_layers import Linear  # noqa: F401
from day16_scaled_dot_product import attention, attention_flops, causal_mask  # noqa: F401
from day17_self_attention import window_mask  # noqa: F401
from day19_positions import apply_rope, rope_tables  # noqa: F401
from torch import Tensor, nn


def kv_cache_bytes(
    layers: int,
    kv_heads: int,
    head_dim: int,
    seq: int,
    batch: int,
    dtype_bytes: int = 2,
    v_head_dim: int | None = None,
) -> int:
    """Return how many bytes the keys and values of `batch` texts of `seq` tokens occupy, in all layers together.

    Each layer keeps kv_heads keys of head_dim numbers and kv_heads values of v_head_dim numbers per token, and a
    number takes dtype_bytes. v_head_dim None means head_dim; 0 means that there are no values.
    """
    raise NotImplementedError


def left_pad_positions(mask: Tensor) -> Tensor:
    """Return the positions (B, T), int64, of tokens in rows that are padded on the left.

    mask (B, T) is True (or 1, in an integer dtype) for tokens and False (or 0) for padding; the padding of a row,
    if there is any, comes before its tokens. The first token of each row stands at 0, the next one at 1, and so on.
    Padding gets 0, also in a row that has no token. B and T may be 0. No loops.
    """
    raise NotImplementedError


class KVCache:
    """Keys and values of up to max_len positions, in buffers (B, Hkv, max_len, D) and (B, Hkv, max_len, Dv).

    batch: B; n_kv_heads: Hkv; head_dim: D; v_head_dim: Dv, None means head_dim
    dtype, device: of the buffers; what is stored is converted to `dtype`
    max_len: an attribute, as it was given
    length: an attribute or property, the number of positions that are stored; 0 at first
    nbytes: an attribute or property, the bytes of both buffers, however many positions are stored

    The buffers are allocated by the constructor, exactly these bytes, and by nothing else: no other method
    allocates any storage. Two caches share no memory. torch.cat, torch.stack and their relatives are forbidden.
    """

    def __init__(
        self,
        batch: int,
        n_kv_heads: int,
        max_len: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        raise NotImplementedError

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store T more positions, and return (K, V): the keys and values of all that are stored, the oldest first.

        k: (B, Hkv, T, D), v: (B, Hkv, T, Dv), any strides; they are copied and not changed. T may be 0.
        Returns K (B, Hkv, L, D) and V (B, Hkv, L, Dv), views of the buffers, with L the new length.

        Raises, and then leaves length and content as they were:
        ValueError if k or v does not fit its buffer, with the shapes of both; if k and v differ in T, with both
        shapes; and if the positions do not fit, with the length, T and max_len in the message.
        RuntimeError if grad mode is on and k or v requires a gradient: a cache keeps no graph. Under torch.no_grad
        or torch.inference_mode everything is taken. What is returned never requires a gradient.
        """
        raise NotImplementedError

    def truncate(self, n: int) -> None:
        """Forget all but the first n positions; the next update overwrites what follows them.

        ValueError, with n and the length in the message, unless 0 <= n <= length.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all positions."""
        raise NotImplementedError


class CachedAttention(nn.Module):
    """Causal multi-head self-attention with rotary positions, for whole texts and for their continuations.

    d_model: D; n_heads: H, each D / H wide; max_len: no text is longer than that; base: of the rotation
    The parameters are `q_proj.weight`, `k_proj.weight`, `v_proj.weight` and `o_proj.weight`, all (D, D), and
    nothing else is in the state dict. Heads are split as on day 1, pairs rotated as on day 19 (neighbors).
    ValueError with d_model and n_heads in the message if D does not divide into H heads of an even width.
    """

    def __init__(self, d_model: int, n_heads: int, max_len: int, *, base: float = 10000.0):
        raise NotImplementedError

    def forward(self, x: Tensor, *, cache: KVCache | None = None, window: int | None = None) -> Tensor:
        """Map x (B, T, D) to (B, T, D), in its dtype; x is not changed, T may be 0.

        cache: anything with the `length` and `update` of KVCache, or None. The first token of x stands at
            cache.length (None: at 0), the others follow. Queries and keys are rotated by their positions; the
            rotated keys, and the values as they are, are given to cache.update, once.
        window: a token attends to itself and to the window - 1 tokens before it; None means to all before it.
            Nobody attends to what is later.

        So a text may be cut into chunks of any sizes: their outputs, joined, are what the whole text would give
        without a cache. All that is remembered is in the cache, nothing in the module.
        Without a cache, gradients flow to x and to the four weights.
        If the last token would stand at max_len or beyond: ValueError with the first position, T and max_len in the
        message, and nothing is stored.
        Cost: 8*D*D + 4*D*S FLOPs per token, where S = cache.length + T before the call. One token on a long cache
        allocates less than three copies of the cached keys would take: old keys are read, not rotated again.
        """
        raise NotImplementedError


class CachedDecoderLM(nn.Module):
    """Day 20's DecoderLM with CachedAttention in its blocks.

    model: a DecoderLM with positions="rope". Its `embedding`, `blocks`, `norm`, `head` and `max_len` are copied, and
        in each block `attention` becomes a CachedAttention with the same weights (and biases, if it has any: keep
        the copied projections themselves), the same `n_heads` and the same `base`. A block hands on keyword
        arguments to its attention.
    The state dict has the names and values of that of the model; embedding and head are one matrix if they were.
    Nothing is shared with the given model, which stays as it was. Training or evaluation mode is that of the
    model, and no random numbers are drawn.
    ValueError with 'learned' in the message if the model has a `position_embedding` (else it is None).
    max_len: an attribute, that of the model
    """

    def __init__(self, model: nn.Module):
        raise NotImplementedError

    def new_caches(self, batch: int, max_len: int | None = None) -> list[KVCache]:
        """Return new empty caches, one per block, with dtype and device of the weights, for `batch` rows.

        max_len: how many tokens they have room for; None means as many as the model takes.
        """
        raise NotImplementedError

    def forward(self, tokens: Tensor, *, caches: Sequence[KVCache] | None = None) -> Tensor:
        """Map tokens (B, T) to logits (B, T, V).

        caches: one per block, or None. With caches, the tokens follow those that the caches have seen, and become
            part of them. Cut into chunks of any sizes, a text gets the logits of the whole.
        More tokens than max_len raise ValueError as in CachedAttention, and no cache moves.
        Without caches the model can be trained.
        """
        raise NotImplementedError


def generate_greedy(model: nn.Module, prompts: Tensor, n_new: int, *, use_cache: bool = True) -> Tensor:
    """Return prompts (B, T) followed by n_new tokens, (B, T + n_new): each time the one with the largest logit.

    use_cache=True: model.new_caches(B, room) is called once, with room for at most T + n_new tokens (but enough
        for those that are fed). Then model(tokens, caches=caches) is called with the prompts, and after that with
        one token per row at a time: n_new calls in all, since nobody asks what follows the last token.
    use_cache=False: model(tokens) is called n_new times with all tokens so far.
    n_new = 0 returns a copy of the prompts and does not call the model. T is at least 1.

    The logits are (B, t, V) for t tokens, and those at the last place count. Grad mode is off while the model runs,
    and as before afterwards. The prompts are not changed.
    """
    raise NotImplementedError


def decode_flops(d_model: int, n_heads: int, head_dim: int, length: int) -> int:
    """Return the FLOPs of one attention layer for one token, when `length` tokens are in its cache already.

    The layer maps d_model to n_heads queries, keys and values of width head_dim (n_heads * head_dim need not be
    d_model) and, after attention, back to d_model. The new token attends to itself, too. Matrix products are
    counted as on day 16, two per multiply-add, and nothing else.
    """
    raise NotImplementedError


def generation_flops(d_model: int, n_heads: int, head_dim: int, prompt: int, n_new: int, cached: bool) -> int:
    """Return the FLOPs of this layer while `generate_greedy` adds n_new tokens to a prompt of `prompt` tokens.

    cached: as use_cache there. A causal mask saves nothing: T tokens without a cache meet T keys each.
    """
    raise NotImplementedError


class RollingKVCache:
    """Keys and values of the last `window` positions, in rings of exactly `window` slots.

    It serves attention in which a query sees itself and the window - 1 positions before it.
    The other arguments are those of KVCache; `nbytes` is the size of both rings, which are allocated by the
    constructor, exactly these bytes, and never grow.
    length: an attribute or property, the number of positions that were seen since the start or the last reset
    """

    def __init__(
        self,
        batch: int,
        n_kv_heads: int,
        window: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        raise NotImplementedError

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take T more positions, and return (K, V, key_positions): what the T new queries need.

        k: (B, Hkv, T, D), v: (B, Hkv, T, Dv); T may be 0, and larger than the window
        Returns K (B, Hkv, L, D) and V (B, Hkv, L, Dv) in the dtype of the cache, and key_positions (L,), int64:
        the T new positions and the last window - 1 before them (fewer, if there were fewer). Any order will do, as
        long as place i of all three belongs together. Positions are counted from 0 and go on through all wraps.
        They need to be valid until the next update only.

        k and v are copied and not changed. One position on a full ring allocates no tensor larger than its keys,
        and new bytes do not grow with length. ValueError for shapes and RuntimeError for gradients as in
        KVCache.update, with the shape of the ring as that of the buffer; then nothing is stored.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything: the next position is 0."""
        raise NotImplementedError


class RaggedKVCache:
    """A cache whose B rows have lengths of their own. The arguments, `nbytes` and the buffers are those of KVCache.

    lengths: an attribute or property (B,), int64, how many positions each row has
    length: an attribute or property, the largest of them, as an int
    """

    def __init__(
        self,
        batch: int,
        n_kv_heads: int,
        max_len: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        raise NotImplementedError

    def update(self, k: Tensor, v: Tensor, n_new: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Store the first n_new[b] places of row b, and return (K, V, mask, positions).

        k: (B, Hkv, T, D), v: (B, Hkv, T, Dv), padded on the right; n_new: int64 (B,), from 0 to T
        Returns K (B, Hkv, L, D) and V (B, Hkv, L, Dv), views of the buffers, L being the new `length`: row b holds
        its own positions in its first lengths[b] places.
        positions (B, T), int64: place t of row b stands at its old length + t.
        mask (B, 1, T, L): True where the key is a position of this row that is not later than the query; all False
        for a query that is padding.

        What stands in the padding of k and v, be it NaN, is never stored: K and V are finite everywhere, if the
        real places are. Padding may reach beyond max_len. k, v and n_new are not changed.
        Raises ValueError as KVCache.update does, and also if n_new has not one number per row (with its shape and
        that of k), if one of its numbers is negative or larger than T (with T in the message), and if a row would
        get longer than max_len (with max_len). RuntimeError for gradients. Then nothing is stored.
        """
        raise NotImplementedError

    def truncate(self, n: int | Tensor) -> None:
        """Forget all but the first n positions of each row; rows that are shorter stay. n may be int64 (B,)."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything."""
        raise NotImplementedError


class PagedKVCache:
    """Many sequences in one pool of n_blocks blocks, each with room for block_size positions.

    A sequence is known by a number and has a table of blocks, of which only the last one may be partly filled.
    Forks share blocks. A block that several sequences hold is copied when one of them writes into it, and only
    then; a block that nobody holds any more is free.
    n_kv_heads: Hkv; head_dim, v_head_dim, dtype, device: as in KVCache
    nbytes: an attribute or property, the size of the pool; the constructor allocates exactly these bytes
    blocks_in_use: an attribute or property, how many blocks are held by a sequence
    An unknown number, or that of a freed sequence, raises KeyError.
    """

    def __init__(
        self,
        n_blocks: int,
        block_size: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        raise NotImplementedError

    def add(self) -> int:
        """Return the number of a new sequence, which is empty and holds no block."""
        raise NotImplementedError

    def fork(self, seq: int) -> int:
        """Return the number of a new sequence with the content of `seq`. No block is taken, nothing is copied."""
        raise NotImplementedError

    def length(self, seq: int) -> int:
        """Return how many positions a sequence has."""
        raise NotImplementedError

    def free(self, seq: int) -> None:
        """Forget a sequence. Blocks that no other one holds are free again."""
        raise NotImplementedError

    def update(self, seq: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append T positions to a sequence; return its keys (Hkv, L, D) and values (Hkv, L, Dv), the oldest first.

        k: (Hkv, T, D), v: (Hkv, T, Dv); T may be 0. Other sequences keep their content.
        Blocks are taken only when they are needed: for positions beyond the last block, and one more if that block
        is partly filled, shared and T > 0.
        Raises, and then leaves everything as it was: ValueError if k or v does not fit, with its shape and that
        of a block, (Hkv, block_size, D or Dv); if they differ in T, with both shapes; and if more blocks are needed
        than are free, with the number of free ones. RuntimeError for gradients as in KVCache.update.
        """
        raise NotImplementedError

    def read(self, seqs: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return (K, V, mask) of N sequences in the given order, as a batch that is padded on the right.

        K (N, Hkv, L, D) and V (N, Hkv, L, Dv) in the dtype of the pool, L being the largest length; what pads is
        finite. mask (N, 1, 1, L) is True where a sequence has a position.
        """
        raise NotImplementedError
