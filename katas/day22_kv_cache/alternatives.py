"""Day 22: right solutions that are written differently."""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

from checker.testing import alternative


@alternative("kv_cache_bytes")
def kv_cache_bytes__by_shapes(layers, kv_heads, head_dim, seq, batch, dtype_bytes=2, v_head_dim=None):
    keys = (batch, kv_heads, seq, head_dim)
    values = (*keys[:3], head_dim if v_head_dim is None else v_head_dim)
    return sum(math.prod(shape) for shape in (keys, values)) * layers * dtype_bytes


@alternative("left_pad_positions")
def left_pad_positions__by_subtraction(mask):
    T = mask.shape[1]
    padding = T - mask.sum(-1, keepdim=True)
    return torch.relu(torch.arange(T, device=mask.device) - padding)


def _check(k, v, keys, values):
    B, H, _, D = keys.shape
    if k.dim() != 4 or k.shape[0] != B or k.shape[1] != H or k.shape[3] != D:
        raise ValueError(f"k {list(k.shape)} for {list(keys.shape)}")
    if v.dim() != 4 or v.shape[:2] != (B, H) or v.shape[3] != values.shape[3]:
        raise ValueError(f"v {list(v.shape)} for {list(values.shape)}")
    if k.size(2) != v.size(2):
        raise ValueError(f"{k.shape} and {v.shape}")
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        raise RuntimeError("gradients")


@alternative("KVCache")
class KVCache__in_one_allocation:
    def __init__(self, batch, n_kv_heads, max_len, head_dim, *, v_head_dim=None, dtype=torch.float32, device=None):
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        rows = batch * n_kv_heads * max_len
        self.memory = torch.empty(rows * (head_dim + v_head_dim), dtype=dtype, device=device)
        self.k = self.memory[: rows * head_dim].view(batch, n_kv_heads, max_len, head_dim)
        self.v = self.memory[rows * head_dim :].view(batch, n_kv_heads, max_len, v_head_dim)
        self.max_len, self.valid = max_len, 0
        self.nbytes = self.memory.numel() * self.memory.element_size()

    @property
    def length(self):
        return self.valid

    def update(self, k, v):
        _check(k, v, self.k, self.v)
        T = k.size(2)
        if self.valid + T > self.max_len:
            raise ValueError(f"{self.valid} and {T} are more than {self.max_len}")
        self.k.narrow(2, self.valid, T).copy_(k.detach())
        self.v.narrow(2, self.valid, T).copy_(v.detach())
        self.valid += T
        return self.k.narrow(2, 0, self.valid), self.v.narrow(2, 0, self.valid)

    def truncate(self, n):
        if n < 0 or n > self.valid:
            raise ValueError(f"{n} of {self.valid}")
        self.valid = n

    def reset(self):
        self.truncate(0)


def _turn(x, start, base):
    """RoPE with complex numbers."""
    T, D = x.shape[-2:]
    frequency = base ** (-torch.arange(0, D, 2, dtype=torch.float64, device=x.device) / D)
    angle = torch.arange(start, start + T, dtype=torch.float64, device=x.device)[:, None] * frequency
    wide = x.double() if x.dtype == torch.float64 else x.float()
    turn = torch.polar(torch.ones_like(angle), angle).to(
        torch.complex128 if x.dtype == torch.float64 else torch.complex64
    )
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


@alternative("CachedAttention")
class CachedAttention__by_sdpa(nn.Module):
    def __init__(self, d_model, n_heads, max_len, *, base=10000.0):
        super().__init__()
        if d_model % n_heads or d_model // n_heads % 2:
            raise ValueError(f"{d_model} and {n_heads}")
        self.n_heads, self.max_len, self.base = n_heads, max_len, base
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(d_model, d_model, bias=False))

    def forward(self, x, *, cache=None, window=None):
        B, T, D = x.shape
        start = cache.length if cache is not None else 0
        if start + T > self.max_len:
            raise ValueError(f"{start} + {T} > {self.max_len}")
        q, k, v = (
            f(x).view(B, T, self.n_heads, D // self.n_heads).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _turn(q, start, self.base), _turn(k, start, self.base)
        if cache is not None:
            k, v = cache.update(k, v)
        distance = torch.arange(start, start + T, device=x.device)[:, None] - torch.arange(k.shape[2], device=x.device)
        allowed = distance >= 0
        if window is not None:
            allowed = allowed & (distance < window)
        out = F.scaled_dot_product_attention(q, k, v, allowed)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, D))


@alternative("CachedDecoderLM")
class CachedDecoderLM__by_hand(nn.Module):
    def __init__(self, model):
        super().__init__()
        if model.position_embedding is not None:
            raise ValueError("learned positions")
        whole = copy.deepcopy(model)
        for name in ("embedding", "blocks", "norm", "head"):
            self.add_module(name, getattr(whole, name))
        self.max_len = whole.max_len
        for block in self.blocks:
            old = block.attention
            with torch.device("meta"):
                width = old.q_proj.weight.shape[1]
                new = CachedAttention__by_sdpa(width, old.n_heads, self.max_len, base=old.base)
            new.q_proj, new.k_proj, new.v_proj, new.o_proj = old.q_proj, old.k_proj, old.v_proj, old.o_proj
            block.attention = new
        for module in self.modules():
            module.training = model.training

    def new_caches(self, batch, max_len=None):
        x = self.embedding.weight
        caches = []
        for block in self.blocks:
            h = block.attention.n_heads
            room = max_len or self.max_len
            caches.append(KVCache__in_one_allocation(batch, h, room, x.shape[1] // h, dtype=x.dtype, device=x.device))
        return caches

    def forward(self, tokens, *, caches=None):
        caches = [None] * len(self.blocks) if caches is None else caches
        x = self.embedding(tokens)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = x + block.attention(block.norm1(x), cache=cache)
            x = x + block.feed_forward(block.norm2(x))
        return self.head(self.norm(x))


@alternative("generate_greedy")
def generate_greedy__by_joining(model, prompts, n_new, *, use_cache=True):
    parts = [prompts]
    if n_new == 0:
        return prompts.clone()
    with torch.inference_mode():
        if use_cache:
            caches = model.new_caches(prompts.shape[0], prompts.shape[1] + n_new - 1)
            for _ in range(n_new):
                parts.append(model(parts[-1], caches=caches)[:, -1:].argmax(-1))
        else:
            for _ in range(n_new):
                parts.append(model(torch.cat(parts, 1))[:, -1:].argmax(-1))
        return torch.cat(parts, 1)


@alternative("decode_flops")
def decode_flops__in_one_line(d_model, n_heads, head_dim, length):
    return n_heads * head_dim * (8 * d_model + 4 * (length + 1))


@alternative("generation_flops")
def generation_flops__closed_form(d_model, n_heads, head_dim, prompt, n_new, cached):
    if n_new < 1:
        return 0
    width, lengths = n_heads * head_dim, range(prompt, prompt + n_new)
    if cached:
        tokens = prompt + n_new - 1
        return width * (8 * d_model * tokens + 4 * prompt**2 + 4 * sum(lengths[1:]))
    return width * sum(8 * d_model * t + 4 * t * t for t in lengths)


@alternative("RollingKVCache")
class RollingKVCache__in_ring_order:
    """Returns the old keys in the order of their slots, which is not that of their positions."""

    def __init__(self, batch, n_kv_heads, window, head_dim, *, v_head_dim=None, dtype=torch.float32, device=None):
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        self.k = torch.zeros(batch, n_kv_heads, window, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros(batch, n_kv_heads, window, v_head_dim, dtype=dtype, device=device)
        self.held = [-1] * window
        self.window, self.length = window, 0
        self.nbytes = self.k.nbytes + self.v.nbytes

    def update(self, k, v):
        _check(k, v, self.k, self.v)
        T, device = k.shape[2], self.k.device
        new = range(self.length, self.length + T)
        needed = [i for i, p in enumerate(self.held) if p >= 0 and p > self.length - self.window]
        slots = torch.tensor(needed, dtype=torch.long, device=device)
        positions = torch.tensor([self.held[i] for i in needed] + list(new), dtype=torch.long, device=device)
        keys = torch.cat([self.k.index_select(2, slots), k.to(self.k.dtype)], 2)
        values = torch.cat([self.v.index_select(2, slots), v.to(self.v.dtype)], 2)
        for p in new[-self.window :] if T else ():
            slot = p % self.window
            self.held[slot] = p
            self.k[:, :, slot] = k[:, :, p - self.length].detach()
            self.v[:, :, slot] = v[:, :, p - self.length].detach()
        self.length += T
        return keys, values, positions

    def reset(self):
        self.length, self.held = 0, [-1] * self.window


@alternative("RaggedKVCache")
class RaggedKVCache__row_by_row:
    def __init__(self, batch, n_kv_heads, max_len, head_dim, *, v_head_dim=None, dtype=torch.float32, device=None):
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        self.k = torch.zeros(batch, n_kv_heads, max_len, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros(batch, n_kv_heads, max_len, v_head_dim, dtype=dtype, device=device)
        self.rows = [0] * batch
        self.max_len = max_len
        self.nbytes = self.k.nbytes + self.v.nbytes

    @property
    def lengths(self):
        return torch.tensor(self.rows, dtype=torch.long, device=self.k.device)

    @property
    def length(self):
        return max(self.rows)

    def update(self, k, v, n_new):
        _check(k, v, self.k, self.v)
        B, _, T, _ = k.shape
        if tuple(n_new.shape) != (B,):
            raise ValueError(f"{n_new.shape} {k.shape}")
        counts = n_new.tolist()
        ends = [old + n for old, n in zip(self.rows, counts, strict=True)]
        if min(counts) < 0 or max(counts) > T or max(ends) > self.max_len:
            raise ValueError(f"{counts} of {T}, up to {ends} of {self.max_len}")
        mask = torch.zeros(B, 1, T, max(ends), dtype=torch.bool, device=k.device)
        places = torch.arange(T, device=k.device)
        positions = torch.stack([places + old for old in self.rows])
        for b, (old, n) in enumerate(zip(self.rows, counts, strict=True)):
            self.k[b, :, old : old + n] = k[b, :, :n]
            self.v[b, :, old : old + n] = v[b, :, :n]
            for t in range(n):
                mask[b, 0, t, : old + t + 1] = True
        self.rows = ends
        return self.k[:, :, : max(ends)], self.v[:, :, : max(ends)], mask, positions

    def truncate(self, n):
        limits = n.tolist() if isinstance(n, torch.Tensor) else [n] * len(self.rows)
        self.rows = [min(old, limit) for old, limit in zip(self.rows, limits, strict=True)]

    def reset(self):
        self.rows = [0] * len(self.rows)


@alternative("PagedKVCache")
class PagedKVCache__block_by_block:
    """Blocks are tensors in two lists of views; sets say who holds which."""

    def __init__(
        self, n_blocks, block_size, n_kv_heads, head_dim, *, v_head_dim=None, dtype=torch.float32, device=None
    ):
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        k = torch.zeros(n_blocks, n_kv_heads, block_size, head_dim, dtype=dtype, device=device)
        v = torch.zeros(n_blocks, n_kv_heads, block_size, v_head_dim, dtype=dtype, device=device)
        self.k, self.v, self.block_size = k, v, block_size
        self.nbytes = k.nbytes + v.nbytes
        self.holders = [set() for _ in range(n_blocks)]
        self.texts, self.count = {}, 0

    @property
    def blocks_in_use(self):
        return sum(bool(holders) for holders in self.holders)

    def add(self):
        self.count += 1
        self.texts[self.count] = ([], 0)
        return self.count

    def fork(self, seq):
        table, length = self.texts[seq]
        self.count += 1
        self.texts[self.count] = (list(table), length)
        for block in table:
            self.holders[block].add(self.count)
        return self.count

    def length(self, seq):
        return self.texts[seq][1]

    def free(self, seq):
        table, _ = self.texts.pop(seq)
        for block in table:
            self.holders[block].discard(seq)

    def update(self, seq, k, v):
        table, length = self.texts[seq]
        for chunk, pool in ((k, self.k), (v, self.v)):
            if chunk.dim() != 3 or chunk.shape[0] != pool.shape[1] or chunk.shape[2] != pool.shape[3]:
                raise ValueError(f"{tuple(chunk.shape)} and {tuple(pool.shape[1:])}")
        T = k.shape[1]
        if T != v.shape[1]:
            raise ValueError(f"{tuple(k.shape)} and {tuple(v.shape)}")
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise RuntimeError("gradients")
        free = [i for i, holders in enumerate(self.holders) if not holders]
        copies = int(T > 0 and length % self.block_size > 0 and len(self.holders[table[-1]]) > 1)
        needed = math.ceil((length + T) / self.block_size) - len(table) + copies
        if needed > len(free):
            raise ValueError(f"{needed} needed, {len(free)} free")
        if copies:
            old, new = table[-1], free.pop(0)
            self.k[new].copy_(self.k[old])
            self.v[new].copy_(self.v[old])
            self.holders[old].remove(seq)
            self.holders[new].add(seq)
            table[-1] = new
        for t in range(T):
            place = (length + t) % self.block_size
            if place == 0:
                table.append(free.pop(0))
                self.holders[table[-1]].add(seq)
            self.k[table[-1], :, place] = k[:, t]
            self.v[table[-1], :, place] = v[:, t]
        self.texts[seq] = (table, length + T)
        return self._joined(self.k, seq), self._joined(self.v, seq)

    def _joined(self, pool, seq):
        table, length = self.texts[seq]
        if not table:
            return pool.new_zeros(pool.shape[1], 0, pool.shape[3])
        return torch.cat([pool[block] for block in table], 1)[:, :length]

    def read(self, seqs):
        lengths = [self.length(seq) for seq in seqs]
        L = max(lengths)
        pads = [(0, 0, 0, L - n) for n in lengths]
        k = torch.stack([F.pad(self._joined(self.k, seq), pad) for seq, pad in zip(seqs, pads, strict=True)])
        v = torch.stack([F.pad(self._joined(self.v, seq), pad) for seq, pad in zip(seqs, pads, strict=True)])
        places = torch.arange(L, device=k.device)
        return k, v, torch.stack([places < n for n in lengths])[:, None, None]
