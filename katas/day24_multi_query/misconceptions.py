"""Day 24: known wrong solutions, each with its sentence."""

import torch

from checker.testing import global_rng_untouched, misconception
from reference import day24_multi_query as right
from reference.day01_tensor_basics import merge_heads, split_heads
from reference.day02_tensor_operations import masked_softmax
from reference.day06_training_loop import train_step
from reference.day08_linear_layers import Linear
from reference.day10_losses import mse_loss
from reference.day11_optimizers import SGD, Adam, AdamW
from reference.day16_scaled_dot_product import attention, causal_mask, combine_masks
from reference.day19_positions import apply_rope, apply_rope_half, rope_tables


def _wide(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# mean_pool_heads


@misconception(
    "mean_pool_heads",
    "The heads were added and not averaged. Keys that are H times as large make scores that are H times as large, and the softmax "
    "sees one place only.",
)
def mean_pool_heads__summed(w, n_heads, n_groups):
    return _wide(right._groups(w, n_heads, n_groups)).sum(1).flatten(0, 1).to(w.dtype)


@misconception(
    "mean_pool_heads",
    "You read the rows as if head 0 had every H-th of them. They lie head by head: all rows of head 0, then all of head 1.",
)
def mean_pool_heads__rows_first(w, n_heads, n_groups):
    right._groups(w, n_heads, n_groups)
    heads = _wide(w).unflatten(0, (-1, n_groups, n_heads // n_groups))  # (Dh, G, H / G, ...)
    return heads.mean(2).transpose(0, 1).flatten(0, 1).to(w.dtype)


@misconception(
    "mean_pool_heads",
    "Heads g, g + G, g + 2G, ... were pooled. A group is made of neighbors, or its queries will read another group's key.",
)
def mean_pool_heads__takes_turns(w, n_heads, n_groups):
    right._groups(w, n_heads, n_groups)
    return _wide(w).unflatten(0, (n_heads // n_groups, n_groups, -1)).mean(0).flatten(0, 1).to(w.dtype)


@misconception(
    "mean_pool_heads",
    "Half numbers were added up in half precision. 50,000 and 50,000 make infinity there, and every sum is rounded.",
)
def mean_pool_heads__in_half(w, n_heads, n_groups):
    return (right._groups(w, n_heads, n_groups).sum(1) / (n_heads // n_groups)).flatten(0, 1)


@misconception(
    "mean_pool_heads",
    "The mean went over the rows of each head as well: a head has become a single row.",
)
def mean_pool_heads__one_row(w, n_heads, n_groups):
    return _wide(right._groups(w, n_heads, n_groups)).mean((1, 2)).to(w.dtype)


# multi_query_attention


def _folded(q, k, v, mask=None, scale=None, softmax=masked_softmax):
    """Right, with a softmax that may be wrong; it sees scores (B, H, T, S)."""
    right._check_shapes(q, k, v)
    B, H, T, D = q.shape
    _, S, Dv = v.shape
    scale = D**-0.5 if scale is None else scale
    scores = ((_wide(q.reshape(B, H * T, D)) * scale) @ _wide(k).mT).view(B, H, T, S)
    weights = softmax(scores, mask).reshape(B, H * T, S)
    return (weights @ _wide(v)).view(B, H, T, Dv).to(q.dtype)


@misconception(
    "multi_query_attention",
    "Your rows go head by head, and those of your mask query by query. The shapes fit, so nobody complains, but each row is hidden "
    "by the mask of another one.",
)
def multi_query_attention__mask_rows_mixed(q, k, v, mask=None, scale=None):
    def softmax(scores, mask):
        if mask is None:
            return masked_softmax(scores, None)
        masked_softmax(scores, mask)
        full = torch.broadcast_to(mask, scores.shape)
        return masked_softmax(scores, full.transpose(1, 2).reshape(scores.shape))

    return _folded(q, k, v, mask, scale, softmax)


@misconception(
    "multi_query_attention",
    "Heads and queries changed places: the rows were folded token by token and unfolded head by head. With one query, or with one head, "
    "this cannot be seen.",
)
def multi_query_attention__folded_the_other_way(q, k, v, mask=None, scale=None):
    right._check_shapes(q, k, v)
    B, H, T, D = q.shape
    return _folded(q.transpose(1, 2).reshape(B, H, T, D), k, v, mask, scale)


@misconception(
    "multi_query_attention",
    "The numbers are right, but the keys were copied for each head, and there are B * H products of small matrices. With one head of keys "
    "the queries of all heads fit into one product per sequence.",
)
def multi_query_attention__expanded(q, k, v, mask=None, scale=None):
    right._check_shapes(q, k, v)
    H = q.shape[1]
    return attention(q, k[:, None].expand(-1, H, -1, -1), v[:, None].expand(-1, H, -1, -1), mask, scale)[0]


@misconception(
    "multi_query_attention",
    "The numbers are right, but each head has a product of its own, and reads the keys anew. Heads are rows: one product "
    "does for all.",
)
def multi_query_attention__head_after_head(q, k, v, mask=None, scale=None):
    right._check_shapes(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.stack([(_wide(head) * scale) @ _wide(k).mT for head in q.unbind(1)], 1)
    weights = masked_softmax(scores, mask)
    return torch.stack([head @ _wide(v) for head in weights.unbind(1)], 1).to(q.dtype)


@misconception(
    "multi_query_attention",
    "One mask was used for all heads, that of head 0. A mask may have a row for each head.",
)
def multi_query_attention__mask_of_head_0(q, k, v, mask=None, scale=None):
    def softmax(scores, mask):
        if mask is not None:
            masked_softmax(scores, mask)
            mask = torch.broadcast_to(mask, scores.shape)[:, :1]
        return masked_softmax(scores, mask)

    return _folded(q, k, v, mask, scale, softmax)


@misconception(
    "multi_query_attention",
    "The scores are too small by the root of H: you scaled as if all heads were one wide query. A query is Dh wide.",
)
def multi_query_attention__scale_of_all_heads(q, k, v, mask=None, scale=None):
    return _folded(q, k, v, mask, (q.shape[1] * q.shape[-1]) ** -0.5 if scale is None else scale)


@misconception(
    "multi_query_attention",
    "The default scale was taken from the width of the values. Scores are sums over the width of queries and keys; day 28 has 576 "
    "numbers in a key and 512 in a value.",
)
def multi_query_attention__scale_of_the_values(q, k, v, mask=None, scale=None):
    return _folded(q, k, v, mask, v.shape[-1] ** -0.5 if scale is None else scale)


@misconception(
    "multi_query_attention",
    "A scale of 0 was taken for no scale. Zero is a number, and only None stands for the default.",
)
def multi_query_attention__zero_is_none(q, k, v, mask=None, scale=None):
    return _folded(q, k, v, mask, scale or None)


@misconception(
    "multi_query_attention",
    "A query that sees nothing became NaN: the softmax of a row of -inf. It has to give zeros, forward and backward.",
)
def multi_query_attention__nan_rows(q, k, v, mask=None, scale=None):
    def softmax(scores, mask):
        masked_softmax(scores, mask)
        return scores.softmax(-1) if mask is None else scores.masked_fill(~mask, -torch.inf).softmax(-1)

    return _folded(q, k, v, mask, scale, softmax)


@misconception(
    "multi_query_attention",
    "Half inputs were multiplied in half precision. A score of 274.125 needs more bits than bfloat16 has.",
)
def multi_query_attention__in_half(q, k, v, mask=None, scale=None):
    right._check_shapes(q, k, v)
    B, H, T, D = q.shape
    _, S, Dv = v.shape
    scale = D**-0.5 if scale is None else scale
    scores = ((q.reshape(B, H * T, D) * scale) @ k.mT).view(B, H, T, S)
    weights = masked_softmax(_wide(scores), mask).to(q.dtype).view(B, H * T, S)
    return (weights @ v).view(B, H, T, Dv)


@misconception(
    "multi_query_attention",
    "Shapes that do not fit end in torch's own error, or in a result that should not exist. Compare them at the door.",
)
def multi_query_attention__never_looks_at_shapes(q, k, v, mask=None, scale=None):
    B, H, T, D = q.shape
    S, Dv = v.shape[1:]
    scale = D**-0.5 if scale is None else scale
    scores = ((_wide(q).reshape(B, H * T, D) * scale) @ _wide(k).mT).view(B, H, T, S)
    return (masked_softmax(scores, mask).view(B, H * T, S) @ _wide(v)).view(B, H, T, Dv).to(q.dtype)


# MultiQueryAttention


class _Layer(right.MultiQueryAttention):
    """The right layer in steps that can go wrong one by one."""

    def where(self, x, cache, positions):
        start = 0 if cache is None else cache.length
        return torch.arange(start, start + x.shape[1], device=x.device) if positions is None else positions

    def turn(self, x, tables):
        return (apply_rope if self.layout == "interleaved" else apply_rope_half)(x, *tables)

    def turn_key(self, k, tables):
        return self.turn(k, tables)

    def turn_value(self, v, tables):
        return v

    def store(self, cache, k, v):
        return cache.update(k, v)

    def allowed(self, T, S, mask, device):
        return combine_masks(causal_mask(T, S, device=device), mask)

    def mix(self, q, k, v, mask):
        return right.multi_query_attention(q, k[:, 0], v[:, 0], mask)

    def one_head(self, x):
        return x[:, None]

    def forward(self, x, *, cache=None, mask=None, positions=None):
        tables = rope_tables(self.where(x, cache, positions), self.head_dim, self.base)
        q = self.turn(split_heads(self.q_proj(x), self.n_heads), tables)
        k = self.turn_key(self.one_head(self.k_proj(x)), tables)
        v = self.turn_value(self.one_head(self.v_proj(x)), tables)
        if cache is not None:
            k, v = self.store(cache, k, v)
        return self.o_proj(merge_heads(self.mix(q, k, v, self.allowed(x.shape[1], k.shape[2], mask, x.device))))


@misconception(
    "MultiQueryAttention",
    "The cache is as large as that of multi-head attention: keys and values were copied for each query head before they were stored. "
    "Store the one head.",
)
class MultiQueryAttention__caches_all_heads(_Layer):
    def store(self, cache, k, v):
        return cache.update(k.expand(-1, self.n_heads, -1, -1), v.expand(-1, self.n_heads, -1, -1))


@misconception(
    "MultiQueryAttention",
    "The cache is small and the outputs are right, but every step makes a copy of it for each head. Let the heads be rows instead.",
)
class MultiQueryAttention__expands_when_reading(_Layer):
    def mix(self, q, k, v, mask):
        H = self.n_heads
        return attention(q, k.expand(-1, H, -1, -1).clone(), v.expand(-1, H, -1, -1).clone(), mask)[0]


@misconception(
    "MultiQueryAttention",
    "k_proj and v_proj still make a key and a value for each head, and these are averaged afterwards. Weights can be averaged once and for "
    "all; then the layer makes one head, and has fewer weights.",
)
class MultiQueryAttention__averages_keys(_Layer):
    def __init__(self, d_model, n_heads, *, head_dim=None, base=10000.0, layout="interleaved"):
        super().__init__(d_model, n_heads, head_dim=head_dim, base=base, layout=layout)
        self.k_proj = Linear(d_model, n_heads * self.head_dim, bias=False)
        self.v_proj = Linear(d_model, n_heads * self.head_dim, bias=False)

    def one_head(self, x):
        return split_heads(x, self.n_heads).mean(1, keepdim=True)


@misconception(
    "MultiQueryAttention",
    "Only queries are turned. The single key needs its position as much as many keys did: the angle between the two is what "
    "tells how far they are apart.",
)
class MultiQueryAttention__keys_not_turned(_Layer):
    def turn_key(self, k, tables):
        return k


@misconception(
    "MultiQueryAttention",
    "Values were turned as well. Positions belong into the scores; what is mixed stays as it is.",
)
class MultiQueryAttention__turns_values(_Layer):
    def turn_value(self, v, tables):
        return self.turn(v, tables)


@misconception(
    "MultiQueryAttention",
    "Each chunk starts at position 0 again. The keys in the cache were turned by where they stand in the whole text, so the new "
    "queries and keys must be too.",
)
class MultiQueryAttention__restarts_at_zero(_Layer):
    def where(self, x, cache, positions):
        return super().where(x, None, positions)


@misconception(
    "MultiQueryAttention",
    "The triangle starts at the top left, so with a warm cache the newest query sees the oldest keys only. Its last row belongs to "
    "the last key.",
)
class MultiQueryAttention__top_left(_Layer):
    def allowed(self, T, S, mask, device):
        return combine_masks(causal_mask(T, S, offset=0, device=device), mask)


@misconception(
    "MultiQueryAttention",
    "With a warm cache there is no causal mask. For one token that is right; in a chunk of several, tokens see their future.",
)
class MultiQueryAttention__no_mask_when_warm(_Layer):
    def allowed(self, T, S, mask, device):
        if S > T:
            return combine_masks(torch.ones(T, S, dtype=torch.bool, device=device), mask)
        return super().allowed(T, S, mask, device)


@misconception(
    "MultiQueryAttention",
    "A mask took the place of causality. It may only forbid more: with a mask that is True everywhere, your queries see the "
    "future.",
)
class MultiQueryAttention__mask_replaces_causality(_Layer):
    def allowed(self, T, S, mask, device):
        return super().allowed(T, S, None, device) if mask is None else mask


@misconception(
    "MultiQueryAttention",
    "The scale was taken from d_model / n_heads. A head is head_dim wide, and that is what its scores are sums over.",
)
class MultiQueryAttention__scale_of_the_model(_Layer):
    def mix(self, q, k, v, mask):
        width = self.q_proj.weight.shape[1] / self.n_heads
        return right.multi_query_attention(q, k[:, 0], v[:, 0], mask, width**-0.5)


# convert_checkpoint


@misconception(
    "convert_checkpoint",
    "The queries were pooled too. Many queries on few keys is what is wanted: they stay as they are.",
)
def convert_checkpoint__pools_queries(state, n_heads, n_kv_heads, method="mean", generator=None):
    converted = right.convert_checkpoint(state, n_heads, n_kv_heads, method, generator)
    for name in converted:
        if name.split(".")[-2] == "q_proj":
            converted[name] = right.mean_pool_heads(state[name], n_heads, n_kv_heads)
    return converted


@misconception(
    "convert_checkpoint",
    "The columns of o_proj were averaged. It still reads one output per *query* head, and none of these went away.",
)
def convert_checkpoint__pools_outputs(state, n_heads, n_kv_heads, method="mean", generator=None):
    converted = right.convert_checkpoint(state, n_heads, n_kv_heads, method, generator)
    for name in converted:
        if name.split(".")[-2] == "o_proj":
            converted[name] = right.mean_pool_heads(state[name].T, n_heads, n_kv_heads).T
    return converted


@misconception(
    "convert_checkpoint",
    "The biases of k_proj and v_proj still have a number for each row of the old heads. They have to be converted like the weights.",
)
def convert_checkpoint__forgets_biases(state, n_heads, n_kv_heads, method="mean", generator=None):
    converted = right.convert_checkpoint(state, n_heads, n_kv_heads, method, generator)
    return {name: state[name] if name.endswith("proj.bias") else w for name, w in converted.items()}


@misconception(
    "convert_checkpoint",
    "Only the keys were converted. Values are cached as well, and have as many heads.",
)
def convert_checkpoint__keys_only(state, n_heads, n_kv_heads, method="mean", generator=None):
    converted = right.convert_checkpoint(state, n_heads, n_kv_heads, method, generator)
    return {name: state[name] if name.split(".")[-2] == "v_proj" else w for name, w in converted.items()}


@misconception(
    "convert_checkpoint",
    "The first G heads of the layer were kept. Asked for is the first head of each *group*: the queries of the last group "
    "would read the key of a stranger.",
)
def convert_checkpoint__first_of_the_layer(state, n_heads, n_kv_heads, method="mean", generator=None):
    converted = right.convert_checkpoint(state, n_heads, n_kv_heads, method, generator)
    if method == "first":
        converted = {name: state[name][: len(w)] for name, w in converted.items()}
    return converted


@misconception(
    "convert_checkpoint",
    "You looked for k_proj anywhere in the name. A norm that is called k_proj_norm has no heads: it is the module's own name "
    "that decides.",
)
def convert_checkpoint__part_of_a_name(state, n_heads, n_kv_heads, method="mean", generator=None):
    converted = right.convert_checkpoint(state, n_heads, n_kv_heads, method, generator)
    for name, w in state.items():
        if name.startswith("k_proj_norm"):
            converted[name] = right.mean_pool_heads(w, n_heads, n_kv_heads)
    return converted


@misconception(
    "convert_checkpoint",
    "Only names that begin with k_proj or v_proj are found. In a whole model the path of the layer stands in front of them.",
)
def convert_checkpoint__top_level_only(state, n_heads, n_kv_heads, method="mean", generator=None):
    converted = right.convert_checkpoint(state, n_heads, n_kv_heads, method, generator)
    return {name: w if name.startswith(("k_proj.", "v_proj.")) else state[name] for name, w in converted.items()}


@misconception(
    "convert_checkpoint",
    "The random numbers have standard deviation 1, whatever was there. Such a layer is louder or softer than the old one: new "
    "numbers have to be as large as those they replace.",
)
def convert_checkpoint__unit_noise(state, n_heads, n_kv_heads, method="mean", generator=None):
    converted = right.convert_checkpoint(state, n_heads, n_kv_heads, method, generator)
    if method == "random":
        converted = {name: w if w is state[name] else w / state[name].std() for name, w in converted.items()}
    return converted


@misconception(
    "convert_checkpoint",
    "The random numbers came from torch's global state and not from the generator, so nobody can have them again.",
)
def convert_checkpoint__global_noise(state, n_heads, n_kv_heads, method="mean", generator=None):
    converted = right.convert_checkpoint(state, n_heads, n_kv_heads, method, generator)
    if method == "random":
        with global_rng_untouched():
            own = torch.Generator()
            own.seed()
            converted = right.convert_checkpoint(state, n_heads, n_kv_heads, method, own)
    return converted


@misconception(
    "convert_checkpoint",
    "The given dict was converted itself. Its owner still needs the old layer, at least to measure what was lost.",
)
def convert_checkpoint__in_place(state, n_heads, n_kv_heads, method="mean", generator=None):
    state.update(right.convert_checkpoint(state, n_heads, n_kv_heads, method, generator))
    return state


# conversion_error


@misconception(
    "conversion_error",
    "This is the size of the difference. Divide it by the size of the old outputs: an error of 0.3 means something only "
    "beside them.",
)
def conversion_error__absolute(module, converted, x):
    with torch.no_grad():
        return (converted(x).double() - module(x).double()).norm().item()


@misconception(
    "conversion_error",
    "The error was divided by the size of the *new* outputs. The old layer is the measure; a new one that puts out zeros has "
    "an error of 1.",
)
def conversion_error__relative_to_the_new(module, converted, x):
    with torch.no_grad():
        new = converted(x).double()
        return ((new - module(x).double()).norm() / new.norm()).item()


@misconception(
    "conversion_error",
    "You divided number by number and averaged. Outputs near zero make such ratios as large as they like: divide two norms, once.",
)
def conversion_error__number_by_number(module, converted, x):
    with torch.no_grad():
        old = module(x).double()
        return ((converted(x).double() - old) / old).abs().mean().item()


@misconception(
    "conversion_error",
    "This is the square of the error: a ratio of sums of squares. The root is missing.",
)
def conversion_error__squared(module, converted, x):
    return right.conversion_error(module, converted, x) ** 2


@misconception(
    "conversion_error",
    "The norms were taken in the precision of the layer. A ratio in float16 has three digits.",
)
def conversion_error__in_half(module, converted, x):
    with torch.no_grad():
        old = module(x)
        return ((converted(x) - old).norm() / old.norm()).item()


# uptrain


def _train(student, teacher, batches, steps, make, *, train="all", pick=None, target=None):
    """Training that can go wrong in its optimizer, its batches or its targets."""
    if train not in ("all", "kv"):
        raise ValueError(f"train {train}")
    if not batches:
        raise ValueError("no batch")
    optimizer = make([p for name, p in student.named_parameters() if train == "all" or right._of_kv(name)])
    losses = []
    for step in range(steps):
        x = batches[step % len(batches)] if pick is None else pick(step)
        with torch.no_grad():
            y = teacher(x)
        losses.append(train_step(student, (x, y), mse_loss if target is None else target, optimizer))
    return losses


@misconception(
    "uptrain",
    "Everything was trained, also with train='kv'. Then all other weights have to be bit for bit what they were.",
)
def uptrain__always_all(student, teacher, batches, steps, lr, *, train="all"):
    right.uptrain(student, teacher, batches, 0, lr, train=train)
    return right.uptrain(student, teacher, batches, steps, lr)


@misconception(
    "uptrain",
    "Only keys and values were trained, also with train='all'.",
)
def uptrain__always_kv(student, teacher, batches, steps, lr, *, train="all"):
    right.uptrain(student, teacher, batches, 0, lr, train=train)
    return right.uptrain(student, teacher, batches, steps, lr, train="kv")


@misconception(
    "uptrain",
    "Every step sees the first batch. The others are never looked at.",
)
def uptrain__one_batch(student, teacher, batches, steps, lr, *, train="all"):
    return right.uptrain(student, teacher, batches[:1], steps, lr, train=train)


@misconception(
    "uptrain",
    "Adam was made anew in each step and has forgotten its averages: every step is a first step, of length lr in each coordinate.",
)
def uptrain__forgets(student, teacher, batches, steps, lr, *, train="all"):
    right.uptrain(student, teacher, batches, 0, lr, train=train)
    losses = []
    for step in range(steps):
        losses += right.uptrain(student, teacher, [batches[step % len(batches)]], 1, lr, train=train)
    return losses


@misconception(
    "uptrain",
    "These are steps of plain gradient descent, and steps of Adam were promised.",
)
def uptrain__sgd(student, teacher, batches, steps, lr, *, train="all"):
    return _train(student, teacher, batches, steps, lambda params: SGD(params, lr=lr), train=train)


@misconception(
    "uptrain",
    "The weights are pulled towards zero as well: your optimizer has a weight decay. Here only the teacher pulls.",
)
def uptrain__decays(student, teacher, batches, steps, lr, *, train="all"):
    return _train(student, teacher, batches, steps, lambda params: AdamW(params, lr=lr, weight_decay=0.1), train=train)


@misconception(
    "uptrain",
    "The squared differences were added and not averaged: the losses are too large by the size of the output.",
)
def uptrain__summed(student, teacher, batches, steps, lr, *, train="all"):
    def total(pred, target):
        return mse_loss(pred, target, "sum")

    return _train(student, teacher, batches, steps, lambda params: Adam(params, lr=lr), train=train, target=total)


@misconception(
    "uptrain",
    "The teacher learns too: gradients went through its outputs. It is only asked.",
)
def uptrain__teaches_the_teacher(student, teacher, batches, steps, lr, *, train="all"):
    losses = right.uptrain(student, teacher, batches, steps, lr, train=train)
    for x in batches[:steps]:
        mse_loss(student(x).detach(), teacher(x)).backward()
    return losses


# tp_cache_bytes


@misconception(
    "tp_cache_bytes",
    "The latent was divided among the ranks. Every head is made of all of it, so every rank keeps all of it.",
)
def tp_cache_bytes__latent_divided(kind, n_heads, n_kv_heads, head_dim, latent, world):
    whole = right.tp_cache_bytes(kind, n_heads, n_kv_heads, head_dim, latent, world)
    return whole // world if kind == "mla" else whole


@misconception(
    "tp_cache_bytes",
    "The single head was divided among the ranks. All queries read the whole of it, wherever they are: it is copied.",
)
def tp_cache_bytes__single_head_divided(kind, n_heads, n_kv_heads, head_dim, latent, world):
    whole = right.tp_cache_bytes(kind, n_heads, n_kv_heads, head_dim, latent, world)
    return whole // world if kind == "mqa" else whole


@misconception(
    "tp_cache_bytes",
    "With more ranks than shared heads, your ranks hold fractions of a head. From there on heads are copied whole.",
)
def tp_cache_bytes__fractions_of_heads(kind, n_heads, n_kv_heads, head_dim, latent, world):
    whole = right.tp_cache_bytes(kind, n_heads, n_kv_heads, head_dim, latent, world)
    return 4 * n_kv_heads * head_dim // world if kind == "gqa" else whole


@misconception(
    "tp_cache_bytes",
    "These are numbers, not bytes: bfloat16 takes two bytes for each.",
)
def tp_cache_bytes__numbers(kind, n_heads, n_kv_heads, head_dim, latent, world):
    return right.tp_cache_bytes(kind, n_heads, n_kv_heads, head_dim, latent, world) // 2


@misconception(
    "tp_cache_bytes",
    "The latent was counted twice, for keys and for values. Both are made of the same one: that is why it is so small.",
)
def tp_cache_bytes__latent_twice(kind, n_heads, n_kv_heads, head_dim, latent, world):
    whole = right.tp_cache_bytes(kind, n_heads, n_kv_heads, head_dim, latent, world)
    return whole * 2 if kind == "mla" else whole


# optimal_shared_key


@misconception(
    "optimal_shared_key",
    "This is the mean of the keys. It is best when all heads ask alike; here one head asks ten times as loudly as another.",
)
def optimal_shared_key__mean(w_q, w_k, x_cal, n_groups):
    right.optimal_shared_key(w_q, w_k, x_cal, n_groups)
    return w_k.double().unflatten(0, (n_groups, -1)).mean(1).to(w_k.dtype)


@misconception(
    "optimal_shared_key",
    "Each head has one weight, its loudness. Queries have directions: a change of the key across all queries of a head costs "
    "nothing, so a weight has to be a matrix.",
)
def optimal_shared_key__loudness(w_q, w_k, x_cal, n_groups):
    right.optimal_shared_key(w_q, w_k, x_cal, n_groups)
    weight = (x_cal.double() @ w_q.double().mT).square().sum((1, 2), keepdim=True)
    both = (weight * w_k.double()).unflatten(0, (n_groups, -1)).sum(1)
    return (both / weight.unflatten(0, (n_groups, -1)).sum(1)).to(w_k.dtype)


@misconception(
    "optimal_shared_key",
    "The mean of the queries was subtracted first. A score is a product with the query as it is, so second moments count, not "
    "covariances.",
)
def optimal_shared_key__centered(w_q, w_k, x_cal, n_groups):
    right.optimal_shared_key(w_q, w_k, x_cal, n_groups)
    return right.optimal_shared_key(w_q, w_k, x_cal - x_cal.mean(0), n_groups)


@misconception(
    "optimal_shared_key",
    "The weights of the queries were taken, and not what they make of the tokens. What the tokens never show costs nothing.",
)
def optimal_shared_key__without_tokens(w_q, w_k, x_cal, n_groups):
    right.optimal_shared_key(w_q, w_k, x_cal, n_groups)
    return right.optimal_shared_key(w_q, w_k, torch.eye(w_q.shape[2], dtype=w_q.dtype, device=w_q.device), n_groups)
