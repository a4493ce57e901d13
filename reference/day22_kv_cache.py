"""A cache of keys and values: each token is projected once, whatever comes after it.

Attention at position t needs the keys and values of all positions before it (Vaswani et al. 2017, arXiv:1706.03762,
section 3.2.3), and none of them changes any more: Shazeer 2019 (arXiv:1911.02150), section 2.4, decodes with them one
token at a time. The ring buffer serves the sliding window of Mistral 7B (arXiv:2310.06825, section 2), the pages with
copy-on-write are those of Kwon et al. 2023 (arXiv:2309.06180), section 4. All caches share one protocol: `length`,
`update` that returns what attention may read, `reset`, `nbytes`, and `truncate` where nothing was forgotten.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reference.day01_tensor_basics import merge_heads, split_heads
from reference.day08_linear_layers import Linear
from reference.day16_scaled_dot_product import attention, attention_flops, causal_mask
from reference.day17_self_attention import window_mask
from reference.day19_positions import apply_rope, rope_tables


def kv_cache_bytes(
    layers: int,
    kv_heads: int,
    head_dim: int,
    seq: int,
    batch: int,
    dtype_bytes: int = 2,
    v_head_dim: int | None = None,
) -> int:
    """Return the bytes of the keys and values of `batch` sequences of `seq` tokens, in all layers."""
    if v_head_dim is None:
        v_head_dim = head_dim
    return layers * batch * seq * kv_heads * (head_dim + v_head_dim) * dtype_bytes


def left_pad_positions(mask: Tensor) -> Tensor:
    """Return the positions (B, T) of left-padded rows: the first token of each row stands at 0."""
    return (mask.cumsum(1) - 1).clamp(min=0)


class KVCache:
    """Keys and values of up to max_len positions in two buffers that are allocated once."""

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
        self.max_len = max_len
        self.keys, self.values = _buffers((batch, n_kv_heads, max_len), head_dim, v_head_dim, dtype, device)
        self.length = 0

    @property
    def nbytes(self) -> int:
        """The bytes of both buffers."""
        return self.keys.nbytes + self.values.nbytes

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k (B, Hkv, T, D) and v (B, Hkv, T, Dv) after what is there; return views of all that is valid."""
        _check_chunk(k, v, self.keys, self.values)
        end = self.length + k.shape[2]
        if end > self.max_len:
            raise ValueError(f"{k.shape[2]} positions after {self.length} do not fit into max_len {self.max_len}")
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]  # (B, Hkv, L, D), (B, Hkv, L, Dv)

    def truncate(self, n: int) -> None:
        """Forget all but the first n positions."""
        if not 0 <= n <= self.length:
            raise ValueError(f"cannot keep {n} of {self.length} positions")
        self.length = n

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0


class CachedAttention(nn.Module):
    """Causal multi-head self-attention with rotary positions that go on where the cache ends."""

    def __init__(self, d_model: int, n_heads: int, max_len: int, *, base: float = 10000.0):
        super().__init__()
        if d_model % (2 * n_heads):
            raise ValueError(f"d_model {d_model} does not divide into {n_heads} heads of an even width")
        self.n_heads, self.max_len, self.base = n_heads, max_len, base
        self.q_proj = Linear(d_model, d_model, bias=False)
        self.k_proj = Linear(d_model, d_model, bias=False)
        self.v_proj = Linear(d_model, d_model, bias=False)
        self.o_proj = Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, *, cache: KVCache | None = None, window: int | None = None) -> Tensor:
        """Map x (B, T, D) to (B, T, D); its first token stands at cache.length, and its keys join the cache."""
        T = x.shape[1]
        start = 0 if cache is None else cache.length
        if start + T > self.max_len:
            raise ValueError(f"{T} tokens after {start} do not fit into max_len {self.max_len}")
        positions = torch.arange(start, start + T, device=x.device)
        q, k, v = (split_heads(layer(x), self.n_heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        tables = rope_tables(positions, q.shape[-1], self.base)  # (T, Dh/2), twice
        q, k = apply_rope(q, *tables), apply_rope(k, *tables)  # (B, H, T, Dh)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, H, S, Dh)
        S = k.shape[2]
        if window is None:
            mask = causal_mask(T, S, device=x.device)  # (T, S)
        else:
            mask = window_mask(T, S, window, device=x.device)  # (T, S)
        out, _ = attention(q, k, v, mask)  # (B, H, T, Dh)
        return self.o_proj(merge_heads(out))  # (B, T, D)


class CachedDecoderLM(nn.Module):
    """A copy of day 20's DecoderLM whose attention layers are CachedAttention."""

    def __init__(self, model: nn.Module):
        super().__init__()
        if model.position_embedding is not None:
            raise ValueError("positions 'learned': only a model with rotary positions can be refitted")
        model = copy.deepcopy(model)
        self.max_len = model.max_len
        self.embedding, self.blocks, self.norm, self.head = model.embedding, model.blocks, model.norm, model.head
        for block in self.blocks:
            block.attention = _refitted(block.attention, self.max_len)
        self.train(model.training)

    def new_caches(self, batch: int, max_len: int | None = None) -> list[KVCache]:
        """Return an empty cache for each block, with room for max_len tokens (default: as many as the model takes)."""
        max_len = self.max_len if max_len is None else max_len
        weight, caches = self.embedding.weight, []
        for block in self.blocks:
            H = block.attention.n_heads
            caches.append(KVCache(batch, H, max_len, weight.shape[1] // H, dtype=weight.dtype, device=weight.device))
        return caches

    def forward(self, tokens: Tensor, *, caches: Sequence[KVCache] | None = None) -> Tensor:
        """Map tokens (B, T) to logits (B, T, V); with caches, the tokens follow those that were seen before."""
        x = self.embedding(tokens)  # (B, T, D)
        for i, block in enumerate(self.blocks):
            x = block(x, cache=None if caches is None else caches[i])  # (B, T, D)
        return self.head(self.norm(x))  # (B, T, V)


@torch.no_grad()
def generate_greedy(model: nn.Module, prompts: Tensor, n_new: int, *, use_cache: bool = True) -> Tensor:
    """Return prompts (B, T) and the n_new most likely tokens after them, (B, T + n_new)."""
    B, T = prompts.shape
    tokens = prompts.new_empty(B, T + n_new)
    tokens[:, :T] = prompts
    options = {"caches": model.new_caches(B, T + n_new)} if use_cache else {}
    seen = 0
    for n in range(T, T + n_new):
        logits = model(tokens[:, seen:n], **options)  # (B, n - seen, V)
        tokens[:, n] = logits[:, -1].argmax(1)
        if use_cache:
            seen = n
    return tokens


def decode_flops(d_model: int, n_heads: int, head_dim: int, length: int) -> int:
    """Return the FLOPs of the layer for one token that comes after `length` cached ones."""
    return _chunk_flops(d_model, n_heads, head_dim, length, 1)


def generation_flops(d_model: int, n_heads: int, head_dim: int, prompt: int, n_new: int, cached: bool) -> int:
    """Return the FLOPs of the layer while n_new tokens are generated after a prompt."""
    if n_new == 0:
        return 0
    total = _chunk_flops(d_model, n_heads, head_dim, 0, prompt)
    for length in range(prompt, prompt + n_new - 1):
        if cached:
            total += decode_flops(d_model, n_heads, head_dim, length)
        else:
            total += _chunk_flops(d_model, n_heads, head_dim, 0, length + 1)
    return total


class RollingKVCache:
    """Keys and values of the last `window` positions, in a ring: position p lives in slot p % window."""

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
        self.window = window
        self.keys, self.values = _buffers((batch, n_kv_heads, window), head_dim, v_head_dim, dtype, device)
        self.length = 0

    @property
    def nbytes(self) -> int:
        """The bytes of both rings."""
        return self.keys.nbytes + self.values.nbytes

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (K, V, key_positions): up to window - 1 old positions and the T new ones; then keep the last `window`."""
        _check_chunk(k, v, self.keys, self.values)
        end = self.length + k.shape[2]
        first = max(0, self.length - self.window + 1)  # the oldest that the first new query sees
        positions = torch.arange(first, end, device=self.keys.device)  # (L,)
        old = positions[: self.length - first] % self.window
        k = torch.cat((self.keys[:, :, old], k.to(self.keys.dtype)), 2)  # (B, Hkv, L, D)
        v = torch.cat((self.values[:, :, old], v.to(self.values.dtype)), 2)  # (B, Hkv, L, Dv)
        slots = positions[-self.window :] % self.window
        self.keys[:, :, slots] = k[:, :, -self.window :]
        self.values[:, :, slots] = v[:, :, -self.window :]
        self.length = end
        return k, v, positions

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0


class RaggedKVCache:
    """A cache whose rows have lengths of their own, filled from chunks that are padded on the right."""

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
        self.max_len = max_len
        self.keys, self.values = _buffers((batch, n_kv_heads, max_len), head_dim, v_head_dim, dtype, device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)  # (B,)

    @property
    def length(self) -> int:
        """The number of positions of the longest row."""
        return int(self.lengths.max())

    @property
    def nbytes(self) -> int:
        """The bytes of both buffers."""
        return self.keys.nbytes + self.values.nbytes

    def update(self, k: Tensor, v: Tensor, n_new: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Store the first n_new[b] places of row b; return (K, V, mask (B, 1, T, L), positions (B, T))."""
        _check_chunk(k, v, self.keys, self.values)
        B, _, T, _ = k.shape
        if n_new.shape != (B,):
            raise ValueError(f"n_new {tuple(n_new.shape)} has not one number for each row of k {tuple(k.shape)}")
        if ((n_new < 0) | (n_new > T)).any():
            raise ValueError(f"n_new {n_new.tolist()} does not lie between 0 and the {T} places of the chunk")
        lengths = self.lengths + n_new  # (B,)
        if (lengths > self.max_len).any():
            raise ValueError(f"rows of {lengths.tolist()} positions do not fit into max_len {self.max_len}")
        step = torch.arange(T, device=k.device)
        positions = self.lengths[:, None] + step  # (B, T)
        real = step < n_new[:, None]  # (B, T)
        row, place = real.nonzero(as_tuple=True)
        slot = positions[row, place]
        self.keys[row, :, slot] = k[row, :, place].to(self.keys.dtype)  # (N, Hkv, D): padding is not stored
        self.values[row, :, slot] = v[row, :, place].to(self.values.dtype)
        self.lengths = lengths
        L = self.length
        past = torch.arange(L, device=k.device) <= positions[..., None]  # (B, T, L)
        mask = (past & real[..., None])[:, None]  # (B, 1, T, L)
        return self.keys[:, :, :L], self.values[:, :, :L], mask, positions

    def truncate(self, n: int | Tensor) -> None:
        """Forget all but the first n positions of each row; n is one number, or one for each row."""
        self.lengths = self.lengths.clamp(max=n)

    def reset(self) -> None:
        """Forget everything."""
        self.truncate(0)


class PagedKVCache:
    """Many sequences in one pool of blocks; forks share blocks until one of them writes."""

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
        self.n_blocks, self.block_size = n_blocks, block_size
        self.keys, self.values = _buffers((n_blocks, block_size, n_kv_heads), head_dim, v_head_dim, dtype, device)
        self.users = [0] * n_blocks  # how many sequences hold each block
        self.tables, self.lengths = {}, {}  # sequence -> its blocks in order, and its number of positions
        self.numbers = itertools.count()

    @property
    def nbytes(self) -> int:
        """The bytes of both pools."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def blocks_in_use(self) -> int:
        """The number of blocks that some sequence holds."""
        return sum(count > 0 for count in self.users)

    def add(self) -> int:
        """Return the number of a new empty sequence."""
        return self._register([], 0)

    def fork(self, seq: int) -> int:
        """Return the number of a new sequence with the content of `seq`; nothing is copied."""
        return self._register(list(self.tables[seq]), self.lengths[seq])

    def length(self, seq: int) -> int:
        """Return the number of positions of a sequence."""
        return self.lengths[seq]

    def free(self, seq: int) -> None:
        """Forget a sequence and give back the blocks that no other one holds."""
        for block in self.tables.pop(seq):
            self.users[block] -= 1
        del self.lengths[seq]

    def update(self, seq: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k (Hkv, T, D) and v (Hkv, T, Dv) to a sequence; return all its keys and values."""
        table, start = self.tables[seq], self.lengths[seq]
        _check_chunk(k, v, self.keys[0].transpose(0, 1), self.values[0].transpose(0, 1))
        end = start + k.shape[1]
        shared = start < end and start % self.block_size > 0 and self.users[table[-1]] > 1
        missing = -(-end // self.block_size) - len(table)
        spare = [block for block in range(self.n_blocks) if self.users[block] == 0]
        if missing + shared > len(spare):
            raise ValueError(f"{missing + shared} blocks are needed, {len(spare)} of {self.n_blocks} are free")
        if shared:  # the half-full block is about to be written, and others read it
            old, new = table[-1], spare.pop()
            self.keys[new], self.values[new] = self.keys[old], self.values[old]
            self.users[old] -= 1
            self.users[new] += 1
            table[-1] = new
        for _ in range(missing):
            table.append(spare.pop())
            self.users[table[-1]] += 1
        self.lengths[seq] = end
        block, place = self._addresses(seq, start)
        self.keys[block, place] = k.transpose(0, 1).to(self.keys.dtype)  # (T, Hkv, D)
        self.values[block, place] = v.transpose(0, 1).to(self.values.dtype)
        return self._gather(seq)

    def read(self, seqs: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return (K, V, mask) of several sequences as a padded batch: (N, Hkv, L, D), (N, Hkv, L, Dv), (N, 1, 1, L)."""
        lengths = torch.tensor([self.lengths[seq] for seq in seqs], device=self.keys.device)
        L = max(self.lengths[seq] for seq in seqs)
        _, _, Hkv, D = self.keys.shape
        k = self.keys.new_zeros(len(seqs), Hkv, L, D)
        v = self.values.new_zeros(len(seqs), Hkv, L, self.values.shape[-1])
        for i, seq in enumerate(seqs):
            n = self.lengths[seq]
            k[i, :, :n], v[i, :, :n] = self._gather(seq)
        mask = torch.arange(L, device=self.keys.device) < lengths[:, None]  # (N, L)
        return k, v, mask[:, None, None]

    def _register(self, table: list[int], length: int) -> int:
        seq = next(self.numbers)
        self.tables[seq], self.lengths[seq] = table, length
        for block in table:
            self.users[block] += 1
        return seq

    def _addresses(self, seq: int, start: int) -> tuple[Tensor, Tensor]:
        """Return the blocks and the places in them of the positions from `start` on."""
        device = self.keys.device
        positions = torch.arange(start, self.lengths[seq], device=device)
        table = torch.tensor(self.tables[seq], dtype=torch.long, device=device)
        return table[positions // self.block_size], positions % self.block_size

    def _gather(self, seq: int) -> tuple[Tensor, Tensor]:
        block, place = self._addresses(seq, 0)
        return self.keys[block, place].transpose(0, 1), self.values[block, place].transpose(0, 1)


def _buffers(
    shape: tuple[int, int, int],
    head_dim: int,
    v_head_dim: int | None,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor]:
    """Return a buffer for keys and one for values."""
    if v_head_dim is None:
        v_head_dim = head_dim
    return tuple(torch.zeros(*shape, width, dtype=dtype, device=device) for width in (head_dim, v_head_dim))


def _check_chunk(k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> None:
    """Raise if a chunk does not fit its buffer (all but the last axis but one), or if it would drag a graph along."""
    for chunk, buffer in ((k, keys), (v, values)):
        if chunk.shape[:-2] + chunk.shape[-1:] != buffer.shape[:-2] + buffer.shape[-1:]:
            raise ValueError(f"a chunk {tuple(chunk.shape)} does not fit into a buffer {tuple(buffer.shape)}")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} differ in the number of positions")
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        raise RuntimeError("a cache keeps no graph: call update under torch.no_grad, or detach k and v")


def _refitted(old: nn.Module, max_len: int) -> CachedAttention:
    """Return a CachedAttention with the projections of day 20's RotaryAttention."""
    with torch.device("meta"):  # layers that are replaced at once need not be drawn
        new = CachedAttention(len(old.q_proj.weight), old.n_heads, max_len, base=old.base)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(new, name, getattr(old, name))
    return new


def _chunk_flops(d_model: int, n_heads: int, head_dim: int, length: int, t: int) -> int:
    """Return the FLOPs of four projections of t tokens, and of their attention to `length` old ones and themselves."""
    projections = 4 * 2 * t * d_model * n_heads * head_dim
    return projections + attention_flops(1, n_heads, t, length + t, head_dim, head_dim)
