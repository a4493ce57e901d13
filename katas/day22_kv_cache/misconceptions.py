"""Day 22: known wrong solutions, each with the sentence for whoever wrote it."""

import copy

import torch

import reference.day22_kv_cache as right
from checker.testing import misconception
from reference.day01_tensor_basics import merge_heads, split_heads
from reference.day16_scaled_dot_product import attention, attention_flops, causal_mask
from reference.day17_self_attention import window_mask
from reference.day19_positions import apply_rope, rope_tables

# kv_cache_bytes


def _bytes(layers, kv_heads, widths, seq, batch, dtype_bytes):
    return layers * kv_heads * widths * seq * batch * dtype_bytes


@misconception(
    "kv_cache_bytes",
    "Half of the bytes are missing: next to each key there is a value.",
)
def kv_cache_bytes__keys_alone(layers, kv_heads, head_dim, seq, batch, dtype_bytes=2, v_head_dim=None):
    return _bytes(layers, kv_heads, head_dim, seq, batch, dtype_bytes)


@misconception(
    "kv_cache_bytes",
    "Values were counted as wide as keys, whatever v_head_dim says. Days 26 to 31 have keys of 192 and values of 128.",
)
def kv_cache_bytes__one_width(layers, kv_heads, head_dim, seq, batch, dtype_bytes=2, v_head_dim=None):
    return _bytes(layers, kv_heads, 2 * head_dim, seq, batch, dtype_bytes)


@misconception(
    "kv_cache_bytes",
    "v_head_dim=0 gave what None gives: 0 counts as false, so `v_head_dim or head_dim` passes over it.",
)
def kv_cache_bytes__zero_is_none(layers, kv_heads, head_dim, seq, batch, dtype_bytes=2, v_head_dim=None):
    return _bytes(layers, kv_heads, head_dim + (v_head_dim or head_dim), seq, batch, dtype_bytes)


@misconception(
    "kv_cache_bytes",
    "Queries were counted too. A query is asked once, by its own token, and nobody needs it afterwards: it is not kept.",
)
def kv_cache_bytes__queries_too(layers, kv_heads, head_dim, seq, batch, dtype_bytes=2, v_head_dim=None):
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    return _bytes(layers, kv_heads, 2 * head_dim + v_head_dim, seq, batch, dtype_bytes)


@misconception(
    "kv_cache_bytes",
    "A number took four bytes by default. Models are served in bfloat16: dtype_bytes is 2 unless something else is said.",
)
def kv_cache_bytes__float32_by_default(layers, kv_heads, head_dim, seq, batch, dtype_bytes=4, v_head_dim=None):
    return right.kv_cache_bytes(layers, kv_heads, head_dim, seq, batch, dtype_bytes, v_head_dim)


# left_pad_positions


@misconception(
    "left_pad_positions",
    "All rows got the same positions, those of the padded layout. A row that is padded by three would begin at position 3, "
    "and its answers would depend on its neighbors: each row counts from its own first token.",
)
def left_pad_positions__one_for_all(mask):
    return torch.arange(mask.shape[1], device=mask.device).expand(mask.shape).contiguous()


@misconception(
    "left_pad_positions",
    "The first token stands at 1: a running sum counts the token itself. Positions begin at 0.",
)
def left_pad_positions__from_one(mask):
    return mask.cumsum(-1)


@misconception(
    "left_pad_positions",
    "Padding stands at -1. Nothing should use it, but a table that is read at -1 gives its last row: padding gets 0.",
)
def left_pad_positions__minus_one(mask):
    return mask.cumsum(-1) - 1


@misconception(
    "left_pad_positions",
    "You counted down the batch, not along the rows: the position of a token depends on the rows above it.",
)
def left_pad_positions__down_the_batch(mask):
    return (mask.cumsum(0) - 1).clamp(min=0)


@misconception(
    "left_pad_positions",
    "These are the positions of rows that are padded on the right. Here the padding comes first, and a row ends at the "
    "right edge.",
)
def left_pad_positions__right_padding(mask):
    places = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(places < mask.sum(-1, keepdim=True), places, 0)


@misconception(
    "left_pad_positions",
    "The positions count padding: they start at the left edge for every row, with zeros where the padding is. The first "
    "token of a row stands at 0, however much was put before it.",
)
def left_pad_positions__padding_counts(mask):
    return torch.arange(mask.shape[1], device=mask.device) * mask.long()


# KVCache


@misconception(
    "KVCache",
    "You returned the whole buffer. The zeros beyond length are keys as well: a score of 0 gets the weight exp(0) = 1, and "
    "each query gives a share of its attention to places where nothing is.",
)
class KVCache__whole_buffer(right.KVCache):
    def update(self, k, v):
        super().update(k, v)
        return self.keys, self.values


@misconception(
    "KVCache",
    "Each update makes a longer tensor and copies the whole history into it. For 128 tokens of 512 bytes that is 4.2 MB "
    "written for a cache of 66 kB, and it grows with the square of the length: write into a buffer that is there.",
)
class KVCache__grows(right.KVCache):
    def update(self, k, v):
        keys, values = super().update(k, v)
        return keys.clone(), values.clone()


@misconception(
    "KVCache",
    "Only the new keys and values came back. A query attends to all positions so far, and so it needs all of them.",
)
class KVCache__only_the_new(right.KVCache):
    def update(self, k, v):
        keys, values = super().update(k, v)
        start = self.length - k.shape[2]
        return keys[:, :, start:], values[:, :, start:]


@misconception(
    "KVCache",
    "Each chunk is written to the beginning of the buffer, over what was there: it belongs behind the length so far.",
)
class KVCache__always_at_the_start(right.KVCache):
    def update(self, k, v):
        length = self.length
        super().update(k, v)
        end, T = self.length, k.shape[2]
        with torch.no_grad():
            self.keys[:, :, length:end], self.values[:, :, length:end] = 0, 0
            self.keys[:, :, :T], self.values[:, :, :T] = k, v
        return self.keys[:, :, :end], self.values[:, :, :end]


@misconception(
    "KVCache",
    "The length grew by 1 for a chunk of several positions. A chunk may bring any number of them, also none.",
)
class KVCache__one_at_a_time(right.KVCache):
    def update(self, k, v):
        start = self.length
        super().update(k, v)
        self.length = start + 1
        return self.keys[:, :, : start + 1], self.values[:, :, : start + 1]


@misconception(
    "KVCache",
    "A chunk that does not fit was cut off silently. The text goes on without some of its tokens, and nobody is told: "
    "raise ValueError, and store nothing.",
)
class KVCache__cuts_off(right.KVCache):
    def update(self, k, v):
        room = self.max_len - self.length
        return super().update(k[:, :, :room], v[:, :, :room])


@misconception(
    "KVCache",
    "When the chunk was refused, the length had moved already: the next update would leave a hole of places that nobody "
    "wrote. Check first, change afterwards.",
)
class KVCache__moves_before_it_checks(right.KVCache):
    def update(self, k, v):
        start = self.length
        try:
            return super().update(k, v)
        except ValueError as error:
            if "max_len" in str(error):
                self.length = min(start + k.shape[2], self.max_len)
            raise


@misconception(
    "KVCache",
    "The last place of the buffer cannot be used: length + T may be equal to max_len.",
)
class KVCache__last_place_unused(right.KVCache):
    def update(self, k, v):
        if self.length + k.shape[2] >= self.max_len:
            raise ValueError(f"{k.shape[2]} positions after {self.length} do not fit into max_len {self.max_len}")
        return super().update(k, v)


@misconception(
    "KVCache",
    "All caches write into the same memory, so the second user reads the first user's keys: buffers belong to the object, "
    "and are made in its constructor.",
)
class KVCache__shared_memory(right.KVCache):
    pool = {}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        place = self.keys.shape, self.values.shape, self.keys.dtype, self.keys.device
        self.keys, self.values = self.pool.setdefault(place, (self.keys, self.values))


@misconception(
    "KVCache",
    "A graph hangs on the cache: every update makes it longer, it is never freed, and the next backward runs through the "
    "whole history. While grad mode is on, refuse what requires a gradient.",
)
class KVCache__keeps_the_graph(right.KVCache):
    def update(self, k, v):
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            with torch.no_grad():
                super().update(k, v)
            return self.keys[:, :, : self.length], self.values[:, :, : self.length]
        return super().update(k, v)


@misconception(
    "KVCache",
    "reset did nothing, so the next prompt is stored behind the last one: its queries read the keys of another user.",
)
class KVCache__reset_keeps(right.KVCache):
    def reset(self):
        pass


@misconception(
    "KVCache",
    "reset made new buffers. Old contents do no harm once the length is 0: only the length says what is valid.",
)
class KVCache__reset_allocates(right.KVCache):
    def reset(self):
        super().reset()
        self.keys, self.values = torch.zeros_like(self.keys), torch.zeros_like(self.values)


@misconception(
    "KVCache",
    "truncate(n) threw away n positions. It says how many are kept: the first n.",
)
class KVCache__truncate_by(right.KVCache):
    def truncate(self, n):
        length = self.length
        super().truncate(n)
        self.length = length - n


@misconception(
    "KVCache",
    "truncate accepted more positions than there are: the cache then claims places that nobody has written.",
)
class KVCache__truncate_grows(right.KVCache):
    def truncate(self, n):
        self.length = n


@misconception(
    "KVCache",
    "nbytes counts what is stored. The buffers are there from the beginning, full or empty, and that is what they occupy.",
)
class KVCache__nbytes_of_the_content(right.KVCache):
    @property
    def nbytes(self):
        full = self.keys.nbytes + self.values.nbytes
        return full * self.length // self.max_len


@misconception(
    "KVCache",
    "nbytes counts numbers, not bytes: each takes dtype.itemsize of them.",
)
class KVCache__nbytes_of_numbers(right.KVCache):
    @property
    def nbytes(self):
        return self.keys.numel() + self.values.numel()


@misconception(
    "KVCache",
    "Values of width 1 or of a smaller batch were spread over their buffer by broadcasting. What has not the shape of the "
    "buffer is a mistake of the caller, and is refused.",
)
class KVCache__broadcasts(right.KVCache):
    def update(self, k, v):
        B, H, _, D = self.keys.shape
        T = max(k.shape[-2], v.shape[-2])
        try:
            k, v = k.expand(B, H, T, D), v.expand(B, H, T, self.values.shape[-1])
        except RuntimeError:
            pass
        return super().update(k, v)


# CachedAttention


class _Steps(right.CachedAttention):
    """The right forward in steps that the wrong ones replace."""

    def start(self, cache):
        return 0 if cache is None else cache.length

    def positions(self, start, T, x):
        return torch.arange(start, start + T, device=x.device), torch.arange(start, start + T, device=x.device)

    def mask(self, T, S, window, x):
        if window is None:
            return causal_mask(T, S, device=x.device)
        return window_mask(T, S, window, device=x.device)

    def remember(self, cache, k, v):
        return cache.update(k, v)

    def rotate(self, x, positions):
        return apply_rope(x, *rope_tables(positions, x.shape[-1], self.base))

    def forward(self, x, *, cache=None, window=None):
        T = x.shape[1]
        start = self.start(cache)
        if start + T > self.max_len:
            raise ValueError(f"{T} tokens after {start} do not fit into max_len {self.max_len}")
        q, k, v = (split_heads(layer(x), self.n_heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q_positions, k_positions = self.positions(start, T, x)
        q, k, v = self.rotate(q, q_positions), self.rotate(k, k_positions), self.values(v, k_positions)
        if cache is not None:
            k, v = self.remember(cache, k, v)
        out, _ = attention(q, k, v, self.mask(T, k.shape[2], window, x))
        return self.o_proj(merge_heads(out))

    def values(self, v, positions):
        return v


@misconception(
    "CachedAttention",
    "Your mask is aligned at the top left: on a warm cache the newest query sees the oldest key, and nothing else. Query i "
    "of a chunk stands at position length + i, so it sees that many keys more.",
)
class CachedAttention__top_left(_Steps):
    def mask(self, T, S, window, x):
        if window is None:
            return causal_mask(T, S, offset=0, device=x.device)
        return window_mask(T, S, window, offset=0, device=x.device)


@misconception(
    "CachedAttention",
    "With a warm cache there was no mask. For a single token that is right, it is the newest; in a chunk of several, the "
    "tokens see their own future.",
)
class CachedAttention__no_mask_when_warm(_Steps):
    def mask(self, T, S, window, x):
        if window is None and S > T:
            return None
        return super().mask(T, S, window, x)


@misconception(
    "CachedAttention",
    "There is no mask at all: every token sees what comes after it.",
)
class CachedAttention__no_mask(_Steps):
    def mask(self, T, S, window, x):
        return None if window is None else super().mask(T, S, window, x)


@misconception(
    "CachedAttention",
    "Positions restart at 0 in every chunk. The keys in the cache were rotated by their places in the text, and only the "
    "difference of two places in the same text means anything: begin at cache.length.",
)
class CachedAttention__positions_restart(_Steps):
    def positions(self, start, T, x):
        return super().positions(0, T, x)


@misconception(
    "CachedAttention",
    "Keys are at their places in the text, but the queries of a chunk count from 0: a query has to be rotated by the same "
    "position as the key of its token.",
)
class CachedAttention__queries_restart(_Steps):
    def positions(self, start, T, x):
        return torch.arange(T, device=x.device), torch.arange(start, start + T, device=x.device)


@misconception(
    "CachedAttention",
    "The length was read after the update, when it counts the new tokens already: on a warm cache the chunk stands T places "
    "too far. Its own tokens keep their distances, those to the keys of earlier chunks are wrong.",
)
class CachedAttention__start_after_the_update(_Steps):
    def positions(self, start, T, x):
        return super().positions(start + (T if start else 0), T, x)


@misconception(
    "CachedAttention",
    "You stored the keys before their rotation and rotate the whole cache for every token. The numbers are right, but a step "
    "now costs work for the full length: rotate a key once, when it is new, and store it rotated.",
)
class CachedAttention__rotates_the_cache_again(_Steps):
    def forward(self, x, *, cache=None, window=None):
        if cache is None:
            return super().forward(x, window=window)
        T, start = x.shape[1], cache.length
        if start + T > self.max_len:
            raise ValueError(f"{T} tokens after {start} do not fit into max_len {self.max_len}")
        q, k, v = (split_heads(layer(x), self.n_heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        k, v = cache.update(k, v)
        q = self.rotate(q, torch.arange(start, start + T, device=x.device))
        k = self.rotate(k, torch.arange(start + T, device=x.device))
        out, _ = attention(q, k, v, self.mask(T, start + T, window, x))
        return self.o_proj(merge_heads(out))


@misconception(
    "CachedAttention",
    "Keys that come out of the cache are rotated once more. They were rotated when they were stored; a second turn moves each "
    "of them to twice its position.",
)
class CachedAttention__rotated_twice(_Steps):
    def remember(self, cache, k, v):
        k, v = cache.update(k, v)
        return self.rotate(k, torch.arange(k.shape[2], device=k.device)), v


@misconception(
    "CachedAttention",
    "Values were rotated as well. A position decides who looks at whom; what is found there has none.",
)
class CachedAttention__rotated_values(_Steps):
    def values(self, v, positions):
        return self.rotate(v, positions)


@misconception(
    "CachedAttention",
    "Nothing is rotated: attention without positions does not know in which order the tokens before it came.",
)
class CachedAttention__no_positions(_Steps):
    def rotate(self, x, positions):
        return x


@misconception(
    "CachedAttention",
    "With a cache the window is forgotten: old keys are still in there, and the mask has to hide them.",
)
class CachedAttention__no_window_when_warm(_Steps):
    def mask(self, T, S, window, x):
        return super().mask(T, S, None if S > T else window, x)


@misconception(
    "CachedAttention",
    "The window is one token too wide: it counts the token itself.",
)
class CachedAttention__wide_window(_Steps):
    def mask(self, T, S, window, x):
        return super().mask(T, S, None if window is None else window + 1, x)


@misconception(
    "CachedAttention",
    "base is ignored: the rotation always has frequencies of 10000.",
)
class CachedAttention__fixed_base(_Steps):
    def rotate(self, x, positions):
        return apply_rope(x, *rope_tables(positions, x.shape[-1]))


@misconception(
    "CachedAttention",
    "The tokens of a chunk attend to each other only, not to what is in the cache: use what update returns.",
)
class CachedAttention__forgets_the_cache(_Steps):
    def remember(self, cache, k, v):
        cache.update(k, v)
        return k, v


@misconception(
    "CachedAttention",
    "The module counts positions itself, so a second text, on a new or an emptied cache, goes on where the first one ended. "
    "All that is remembered belongs into the cache.",
)
class CachedAttention__counts_itself(_Steps):
    seen = 0

    def positions(self, start, T, x):
        if not start:
            start = self.seen
        self.seen = start + T
        return super().positions(start, T, x)


@misconception(
    "CachedAttention",
    "A text that is too long was stored before it was refused. Compare with max_len first, then update.",
)
class CachedAttention__checks_too_late(_Steps):
    def forward(self, x, *, cache=None, window=None):
        if cache is not None and cache.length + x.shape[1] > self.max_len:
            k = split_heads(self.k_proj(x), self.n_heads)
            T, start = x.shape[1], cache.length
            cache.update(k, k)
            raise ValueError(f"{T} tokens after {start} do not fit into max_len {self.max_len}")
        return super().forward(x, cache=cache, window=window)


# CachedDecoderLM


class _Model(right.CachedDecoderLM):
    pass


@misconception(
    "CachedDecoderLM",
    "The layers of the given model were replaced in place: it has changed under the hands of whoever uses it. Work on a deep "
    "copy.",
)
class CachedDecoderLM__in_place(_Model):
    def __init__(self, model):
        super().__init__(model)
        for block, mine in zip(model.blocks, self.blocks, strict=True):
            block.attention = mine.attention


@misconception(
    "CachedDecoderLM",
    "The new model shares its weights with the given one: a shallow copy has the same parameters, and training one would "
    "train both.",
)
class CachedDecoderLM__shared_weights(_Model):
    def __init__(self, model):
        super().__init__(model)
        mine = dict(self.named_parameters())
        for name, parameter in model.named_parameters():
            mine[name].data = parameter.data


@misconception(
    "CachedDecoderLM",
    "All blocks write into one cache. Each layer has keys of its own, made from its own input: one cache per block.",
)
class CachedDecoderLM__one_cache(_Model):
    def new_caches(self, batch, max_len=None):
        caches = super().new_caches(batch, max_len)
        return [caches[0]] * len(caches)


@misconception(
    "CachedDecoderLM",
    "The caches are made once and handed out again: the next prompt finds the keys of the last one in there.",
)
class CachedDecoderLM__keeps_its_caches(_Model):
    def new_caches(self, batch, max_len=None):
        kept = self.__dict__.setdefault("kept", {})
        if (batch, max_len) not in kept:
            kept[batch, max_len] = super().new_caches(batch, max_len)
        return kept[batch, max_len]


@misconception(
    "CachedDecoderLM",
    "The attention layers are new ones with random weights: the projections of the given model were not taken over.",
)
class CachedDecoderLM__fresh_weights(_Model):
    def __init__(self, model):
        super().__init__(model)
        for block in self.blocks:
            old = block.attention
            D = old.q_proj.weight.shape[0]
            bias = old.q_proj.bias is not None
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    setattr(old, name, right.Linear(D, D, bias).to(old.q_proj.weight))


@misconception(
    "CachedDecoderLM",
    "Biases of the projections are lost: CachedAttention has none when it is made, but the copied projections may. Keep "
    "them as they are.",
)
class CachedDecoderLM__no_biases(_Model):
    def __init__(self, model):
        super().__init__(model)
        for block in self.blocks:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(block.attention, name).bias = None


@misconception(
    "CachedDecoderLM",
    "base was left at 10000: the model was trained with another rotation.",
)
class CachedDecoderLM__default_base(_Model):
    def __init__(self, model):
        super().__init__(model)
        for block in self.blocks:
            block.attention.base = 10000.0


@misconception(
    "CachedDecoderLM",
    "The new model is in training mode whatever the given one was: a fresh module always is, and its parts with it.",
)
class CachedDecoderLM__training(_Model):
    def __init__(self, model):
        super().__init__(model)
        self.train()


@misconception(
    "CachedDecoderLM",
    "Embedding and head were one matrix and are two now: copied one by one they come apart. Copy the whole model at once.",
)
class CachedDecoderLM__untied(_Model):
    def __init__(self, model):
        super().__init__(model)
        self.head = copy.deepcopy(self.head)


@misconception(
    "CachedDecoderLM",
    "The caches are float32, whatever the model is: a float64 model loses half of its digits there, and a bfloat16 one pays "
    "twice.",
)
class CachedDecoderLM__float32_caches(_Model):
    def new_caches(self, batch, max_len=None):
        D = self.embedding.weight.shape[1]
        device = self.embedding.weight.device
        room = self.max_len if max_len is None else max_len
        heads = [block.attention.n_heads for block in self.blocks]
        return [right.KVCache(batch, h, room, D // h, device=device) for h in heads]


@misconception(
    "CachedDecoderLM",
    "max_len of new_caches is not looked at: each cache has room for the longest text that the model takes.",
)
class CachedDecoderLM__full_caches(_Model):
    def new_caches(self, batch, max_len=None):
        return super().new_caches(batch)


# generate_greedy


@torch.no_grad()
def _generate(model, prompts, n_new, use_cache, *, caches=None, last_too=False, always_all=False, choose=None, room=0):
    B, T = prompts.shape
    options = {}
    if use_cache:
        options["caches"] = model.new_caches(B, T + n_new + room) if caches is None else caches
    tokens, seen = prompts.clone(), 0
    for _ in range(n_new):
        logits = model(tokens[:, seen:], **options)
        if use_cache and not always_all:
            seen = tokens.shape[1]
        choice = logits[:, -1].argmax(-1) if choose is None else choose(logits)
        tokens = torch.cat([tokens, choice[:, None]], 1)
    if last_too and n_new:
        model(tokens[:, seen:], **options)
    return tokens


@misconception(
    "generate_greedy",
    "The model is called once more after the last token was found. Nobody asks what follows it: n_new tokens need the "
    "prompt and n_new - 1 steps.",
)
def generate_greedy__one_call_too_many(model, prompts, n_new, *, use_cache=True):
    return _generate(model, prompts, n_new, use_cache, last_too=True)


@misconception(
    "generate_greedy",
    "All tokens are fed in every step, although the cache has them: it then holds the text several times over.",
)
def generate_greedy__feeds_everything(model, prompts, n_new, *, use_cache=True):
    return _generate(model, prompts, n_new, use_cache, always_all=True, room=1000)


@misconception(
    "generate_greedy",
    "The prompt is fed token by token. It is known in full: one call with all of it fills the cache, and its matrix products "
    "are large instead of many.",
)
@torch.no_grad()
def generate_greedy__prompt_token_by_token(model, prompts, n_new, *, use_cache=True):
    if not use_cache or not n_new:
        return _generate(model, prompts, n_new, use_cache)
    caches = model.new_caches(len(prompts), prompts.shape[1] + n_new)
    tokens = prompts
    for i in range(prompts.shape[1] + n_new - 1):
        logits = model(tokens[:, i : i + 1], caches=caches)
        if i >= prompts.shape[1] - 1:
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens


_KEPT = {}


@misconception(
    "generate_greedy",
    "The caches of the last call are used again, and the second user reads the first user's keys. New prompts need new "
    "caches.",
)
def generate_greedy__keeps_caches(model, prompts, n_new, *, use_cache=True):
    if not use_cache or not n_new:
        return _generate(model, prompts, n_new, use_cache)
    if _KEPT.get("model") is not model:
        _KEPT.update(model=model, caches=model.new_caches(len(prompts), 1000))
    try:
        return _generate(model, prompts, n_new, True, caches=_KEPT["caches"])
    except RuntimeError:
        _KEPT.clear()
        raise


@misconception(
    "generate_greedy",
    "use_cache is ignored: everything is fed again for every token, and the work grows with the square of the length.",
)
def generate_greedy__never_cached(model, prompts, n_new, *, use_cache=True):
    return _generate(model, prompts, n_new, False)


@misconception(
    "generate_greedy",
    "The logits of the first place were used. Each place scores the token after it: what follows the text is at the last "
    "place.",
)
def generate_greedy__first_place(model, prompts, n_new, *, use_cache=True):
    return _generate(model, prompts, n_new, use_cache, choose=lambda logits: logits[:, 0].argmax(-1))


@misconception(
    "generate_greedy",
    "Only the new tokens came back: the prompt belongs in front of them.",
)
def generate_greedy__without_the_prompt(model, prompts, n_new, *, use_cache=True):
    return _generate(model, prompts, n_new, use_cache)[:, prompts.shape[1] :]


@misconception(
    "generate_greedy",
    "Grad mode is on while the model runs: a graph over all steps is kept, and a cache refuses it. Nothing is trained here.",
)
def generate_greedy__with_a_graph(model, prompts, n_new, *, use_cache=True):
    if not isinstance(model, right.CachedDecoderLM):
        with torch.enable_grad():
            return _generate.__wrapped__(model, prompts, n_new, use_cache)
    return _generate(model, prompts, n_new, use_cache)


@misconception(
    "generate_greedy",
    "One number was chosen for the whole batch: an argmax without a dimension runs over all rows, and its index counts "
    "through all of them.",
)
def generate_greedy__one_choice_for_all(model, prompts, n_new, *, use_cache=True):
    def choose(logits):
        return logits[:, -1].argmax().expand(len(logits))

    return _generate(model, prompts, n_new, use_cache, choose=choose)


# decode_flops


def _projections(d_model, n_heads, head_dim, t):
    return 8 * t * d_model * n_heads * head_dim


@misconception(
    "decode_flops",
    "The new token does not look at itself in your count: with `length` cached tokens there are length + 1 keys.",
)
def decode_flops__not_itself(d_model, n_heads, head_dim, length):
    return _projections(d_model, n_heads, head_dim, 1) + attention_flops(1, n_heads, 1, length, head_dim, head_dim)


@misconception(
    "decode_flops",
    "All cached tokens are projected again in your count. Their keys and values are in the cache: only the new token meets "
    "the weights.",
)
def decode_flops__projects_the_cache(d_model, n_heads, head_dim, length):
    return _projections(d_model, n_heads, head_dim, length + 1) + attention_flops(
        1, n_heads, 1, length + 1, head_dim, head_dim
    )


@misconception(
    "decode_flops",
    "Every key meets every other one in your count. A step has one query: it is linear in the length, not quadratic.",
)
def decode_flops__square(d_model, n_heads, head_dim, length):
    n = length + 1
    return _projections(d_model, n_heads, head_dim, 1) + attention_flops(1, n_heads, n, n, head_dim, head_dim)


@misconception(
    "decode_flops",
    "A multiplication and the addition after it are two operations, as on day 16; you counted one.",
)
def decode_flops__half(d_model, n_heads, head_dim, length):
    return right.decode_flops(d_model, n_heads, head_dim, length) // 2


@misconception(
    "decode_flops",
    "The output projection is missing: after attention, the heads are mixed and mapped back to d_model.",
)
def decode_flops__no_output_map(d_model, n_heads, head_dim, length):
    return right.decode_flops(d_model, n_heads, head_dim, length) - 2 * d_model * n_heads * head_dim


@misconception(
    "decode_flops",
    "The projections were taken as d_model by d_model. The heads together are n_heads * head_dim wide, which need not be "
    "d_model.",
)
def decode_flops__square_projections(d_model, n_heads, head_dim, length):
    return 8 * d_model * d_model + attention_flops(1, n_heads, 1, length + 1, head_dim, head_dim)


def _generation(d_model, n_heads, head_dim, prompt, n_new, cached, extra):
    return right.generation_flops(d_model, n_heads, head_dim, prompt, n_new + extra, cached)


@misconception(
    "generation_flops",
    "One step too many: the last token is never fed, so n_new tokens need the prompt and n_new - 1 further calls.",
)
def generation_flops__one_call_too_many(d_model, n_heads, head_dim, prompt, n_new, cached):
    return _generation(d_model, n_heads, head_dim, prompt, n_new, cached, 1)


@misconception(
    "generation_flops",
    "cached makes no difference in your count. Without a cache the whole text runs through the layer for every new token.",
)
def generation_flops__always_cached(d_model, n_heads, head_dim, prompt, n_new, cached):
    return right.generation_flops(d_model, n_heads, head_dim, prompt, n_new, True)


@misconception(
    "generation_flops",
    "The prompt is missing: before the first token can be chosen, all of the prompt has to run through the layer.",
)
def generation_flops__no_prompt(d_model, n_heads, head_dim, prompt, n_new, cached):
    first = right.generation_flops(d_model, n_heads, head_dim, prompt, min(n_new, 1), cached)
    return right.generation_flops(d_model, n_heads, head_dim, prompt, n_new, cached) - first


@misconception(
    "generation_flops",
    "Every step costs the same in your count, that of the first one. The cache grows: each step has one key more to look at.",
)
def generation_flops__constant_steps(d_model, n_heads, head_dim, prompt, n_new, cached):
    if not cached or n_new == 0:
        return right.generation_flops(d_model, n_heads, head_dim, prompt, n_new, cached)
    step = right.decode_flops(d_model, n_heads, head_dim, prompt)
    return right.generation_flops(d_model, n_heads, head_dim, prompt, 1, True) + (n_new - 1) * step


# RollingKVCache


class _Ring(right.RollingKVCache):
    """The right ring in steps that the wrong ones replace."""

    def first(self):
        return max(0, self.length - self.window + 1)

    def kept(self, positions):
        return positions[-self.window :]

    def update(self, k, v):
        right._check_chunk(k, v, self.keys, self.values)
        end = self.length + k.shape[2]
        positions = torch.arange(self.first(), end, device=self.keys.device)
        old = positions[positions < self.length] % self.window
        k = torch.cat((self.keys[:, :, old], k.to(self.keys.dtype)), 2)
        v = torch.cat((self.values[:, :, old], v.to(self.values.dtype)), 2)
        kept = self.kept(positions)
        self.keys[:, :, kept % self.window] = k[:, :, kept - positions[:1]]
        self.values[:, :, kept % self.window] = v[:, :, kept - positions[:1]]
        self.length = end
        return k, v, positions


@misconception(
    "RollingKVCache",
    "The ring was written before it was read. The first queries of a chunk still need old keys whose slots the later tokens "
    "of the chunk have taken: collect what is needed first, overwrite afterwards.",
)
class RollingKVCache__written_first(right.RollingKVCache):
    def update(self, k, v):
        start = self.length
        _, _, positions = super().update(k, v)
        slots = positions % self.window
        new = positions >= start
        keys, values = self.keys[:, :, slots], self.values[:, :, slots]
        keys[:, :, new], values[:, :, new] = k.to(keys.dtype), v.to(values.dtype)
        return keys, values, positions


@misconception(
    "RollingKVCache",
    "Only the last `window` positions came back, as many as are stored. That is what the newest query needs; the first query "
    "of the chunk looks back from where it stands itself.",
)
class RollingKVCache__only_what_is_stored(_Ring):
    def update(self, k, v):
        k, v, positions = super().update(k, v)
        return k[:, :, -self.window :], v[:, :, -self.window :], positions[-self.window :]


@misconception(
    "RollingKVCache",
    "The positions are slots: they go back to 0 when the ring wraps. Keys were rotated by their places in the text, and the "
    "mask needs these too.",
)
class RollingKVCache__positions_are_slots(_Ring):
    def update(self, k, v):
        k, v, positions = super().update(k, v)
        return k, v, positions % self.window


@misconception(
    "RollingKVCache",
    "The positions count from 0 in what is returned. They are places in the text and go on through all wraps.",
)
class RollingKVCache__positions_restart(_Ring):
    def update(self, k, v):
        k, v, positions = super().update(k, v)
        return k, v, positions - positions[:1]


@misconception(
    "RollingKVCache",
    "One old position too many: `window` old ones came back beside the new. A query counts itself, so it looks back at "
    "window - 1 others.",
)
class RollingKVCache__one_too_many(_Ring):
    def first(self):
        return max(0, self.length - self.window)


@misconception(
    "RollingKVCache",
    "One old position is missing: the oldest one that the first new query may see was left out.",
)
class RollingKVCache__one_too_few(_Ring):
    def first(self):
        return min(self.length, max(0, self.length - self.window + 2))


@misconception(
    "RollingKVCache",
    "length stops at the window. It counts what was seen, since the next position is derived from it.",
)
class RollingKVCache__length_of_the_ring(_Ring):
    def update(self, k, v):
        found = super().update(k, v)
        self.length = min(self.length, self.window)
        return found


@misconception(
    "RollingKVCache",
    "Of a chunk that is longer than the window the first positions were stored. What the next query needs are the last ones.",
)
class RollingKVCache__stores_the_first(_Ring):
    def kept(self, positions):
        new = positions[positions >= self.length]
        return new[: self.window]


@misconception(
    "RollingKVCache",
    "Nothing is forgotten: the cache grows with the text. With a window, `window` slots are all that is ever needed.",
)
class RollingKVCache__grows(_Ring):
    @property
    def nbytes(self):
        return (self.keys.nbytes + self.values.nbytes) // self.window * max(self.window, self.length)


@misconception(
    "RollingKVCache",
    "reset forgets the keys but not the length: the next prompt begins in the middle of a text.",
)
class RollingKVCache__reset_keeps_the_length(_Ring):
    def reset(self):
        self.keys.zero_()
        self.values.zero_()


# RaggedKVCache


@misconception(
    "RaggedKVCache",
    "Padding was stored. It is masked, but a masked place still has the weight 0, and 0 times NaN is NaN: what is not real "
    "must not get into the buffers.",
)
class RaggedKVCache__stores_padding(right.RaggedKVCache):
    def update(self, k, v, n_new):
        start = self.lengths
        *_, mask, positions = super().update(k, v, n_new)
        for b, begin in enumerate(start.tolist()):
            end = min(begin + k.shape[2], self.max_len)
            self.keys[b, :, begin:end] = k[b, :, : end - begin].detach()
            self.values[b, :, begin:end] = v[b, :, : end - begin].detach()
        return self.keys[:, :, : self.length], self.values[:, :, : self.length], mask, positions


class _SameStart(right.RaggedKVCache):
    """Every row is written from `begin` on, and `lengths` is what it should be."""

    def update(self, k, v, n_new):
        start, begin = self.lengths, self.begin()
        *_, mask, positions = super().update(k, v, n_new)
        for b, n in enumerate(n_new.tolist()):
            old = int(start[b])
            if begin + n <= self.max_len:
                self.keys[b, :, old : old + n], self.values[b, :, old : old + n] = 0, 0
                self.keys[b, :, begin : begin + n] = k[b, :, :n].detach()
                self.values[b, :, begin : begin + n] = v[b, :, :n].detach()
        return self.keys[:, :, : self.length], self.values[:, :, : self.length], mask, positions


@misconception(
    "RaggedKVCache",
    "All rows were written from the same place on, the end of the longest one. Shorter rows get holes: each goes on at its "
    "own length.",
)
class RaggedKVCache__one_start(_SameStart):
    def begin(self):
        return self.length


@misconception(
    "RaggedKVCache",
    "Every row advanced by T. The padding is no token: row b advances by n_new[b].",
)
class RaggedKVCache__advances_by_the_chunk(right.RaggedKVCache):
    def update(self, k, v, n_new):
        start = self.lengths
        found = super().update(k, v, n_new)
        self.lengths = (start + k.shape[2]).clamp(max=self.max_len)
        return self.keys[:, :, : self.length], self.values[:, :, : self.length], *found[2:]


@misconception(
    "RaggedKVCache",
    "All rows have the same positions, those of the longest one. Each row stands where its own text has come to.",
)
class RaggedKVCache__shared_positions(right.RaggedKVCache):
    def update(self, k, v, n_new):
        start = self.length
        *found, positions = super().update(k, v, n_new)
        return *found, (torch.arange(k.shape[2], device=k.device) + start).expand_as(positions).contiguous()


@misconception(
    "RaggedKVCache",
    "The positions restart at 0 in every chunk: a row goes on at its own length.",
)
class RaggedKVCache__positions_restart(right.RaggedKVCache):
    def update(self, k, v, n_new):
        *found, positions = super().update(k, v, n_new)
        return *found, torch.arange(k.shape[2], device=k.device).expand_as(positions).contiguous()


@misconception(
    "RaggedKVCache",
    "The mask hides what lies beyond the end of a row, but not the future: inside the chunk, a token sees the ones after it.",
)
class RaggedKVCache__sees_the_future(right.RaggedKVCache):
    def update(self, k, v, n_new):
        keys, values, mask, positions = super().update(k, v, n_new)
        real = (torch.arange(k.shape[2], device=k.device) < n_new[:, None])[:, None, :, None]
        inside = (torch.arange(self.length, device=k.device) < self.lengths[:, None])[:, None, None]
        return keys, values, real & inside, positions


@misconception(
    "RaggedKVCache",
    "Queries that are padding see keys. They are nobody's tokens: their rows of the mask are all False, and attention gives "
    "zeros for them.",
)
class RaggedKVCache__padding_sees(right.RaggedKVCache):
    def update(self, k, v, n_new):
        keys, values, _, positions = super().update(k, v, n_new)
        past = torch.arange(self.length, device=k.device) <= positions[..., None]
        inside = torch.arange(self.length, device=k.device) < self.lengths[:, None, None]
        return keys, values, (past & inside)[:, None], positions


@misconception(
    "RaggedKVCache",
    "Queries do not see the token that they belong to: a position is allowed if it is not later, its own included.",
)
class RaggedKVCache__not_itself(right.RaggedKVCache):
    def update(self, k, v, n_new):
        keys, values, mask, positions = super().update(k, v, n_new)
        itself = torch.arange(self.length, device=k.device) == positions[..., None]
        return keys, values, mask & ~itself[:, None], positions


@misconception(
    "RaggedKVCache",
    "The whole buffer came back: max_len keys where the longest row has fewer. Cut K, V and the mask to the longest row.",
)
class RaggedKVCache__whole_buffer(right.RaggedKVCache):
    def update(self, k, v, n_new):
        _, _, mask, positions = super().update(k, v, n_new)
        missing = self.max_len - self.length
        return self.keys, self.values, torch.nn.functional.pad(mask, (0, missing)), positions


@misconception(
    "RaggedKVCache",
    "truncate(n) set every row to n. A row that has fewer positions cannot grow by it: its length stays.",
)
class RaggedKVCache__truncate_grows(right.RaggedKVCache):
    def truncate(self, n):
        self.lengths = torch.zeros_like(self.lengths) + n


# PagedKVCache


@misconception(
    "PagedKVCache",
    "A fork copies the blocks of its parent. Eight samples of one prompt then hold the prompt eight times: share the blocks, "
    "and copy one only when somebody writes into it.",
)
class PagedKVCache__fork_copies(right.PagedKVCache):
    def fork(self, seq):
        k, v = self._gather(seq)
        new = self.add()
        self.update(new, k, v)
        return new


@misconception(
    "PagedKVCache",
    "A shared block was written in place: the other sequences read the tokens of this one. Who shares a half-full block has "
    "to copy it before the first write.",
)
class PagedKVCache__writes_into_shared_blocks(right.PagedKVCache):
    def update(self, seq, k, v):
        table = self.tables[seq]
        last = table[-1] if table and self.lengths[seq] % self.block_size else None
        if last is None:
            return super().update(seq, k, v)
        others, self.users[last] = self.users[last], 1
        try:
            return super().update(seq, k, v)
        finally:
            self.users[last] = others


@misconception(
    "PagedKVCache",
    "free gives back blocks that others still hold: the next sequence overwrites them. A block is free when the last one who "
    "holds it has left.",
)
class PagedKVCache__frees_what_others_hold(right.PagedKVCache):
    def free(self, seq):
        table = list(self.tables[seq])
        super().free(seq)
        for block in table:
            self.users[block] = 0


@misconception(
    "PagedKVCache",
    "free forgets the sequence but keeps its blocks: after some requests the pool is full of texts that nobody can read.",
)
class PagedKVCache__never_frees(right.PagedKVCache):
    def free(self, seq):
        table = list(self.tables[seq])
        super().free(seq)
        for block in table:
            self.users[block] += 1


@misconception(
    "PagedKVCache",
    "Every write takes a new block. The last block of a sequence has room left: fill it first.",
)
class PagedKVCache__always_a_new_block(right.PagedKVCache):
    def update(self, seq, k, v):
        found = super().update(seq, k, v)
        spare = [block for block in range(self.n_blocks) if self.users[block] == 0]
        if k.shape[1] and spare and self.lengths[seq] % self.block_size:
            self.wasted = [*getattr(self, "wasted", []), spare[0]]
            self.users[spare[0]] = 1
        return found


@misconception(
    "PagedKVCache",
    "The mask of the batch is True everywhere: shorter sequences attend to what pads them.",
)
class PagedKVCache__reads_padding(right.PagedKVCache):
    def read(self, seqs):
        k, v, mask = super().read(seqs)
        return k, v, torch.ones_like(mask)


@misconception(
    "PagedKVCache",
    "The batch is sorted by number. Whoever asks for sequences 2, 0, 1 has queries in this order.",
)
class PagedKVCache__sorts(right.PagedKVCache):
    def read(self, seqs):
        return super().read(sorted(seqs))
