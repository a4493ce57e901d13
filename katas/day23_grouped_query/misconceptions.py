"""Day 23: known wrong solutions, each with its sentence."""

from itertools import combinations

import torch
from torch import nn

from checker.testing import misconception
from reference import day23_grouped_query as right
from reference.day01_tensor_basics import merge_heads, split_heads
from reference.day02_tensor_operations import masked_softmax
from reference.day16_scaled_dot_product import causal_mask, combine_masks
from reference.day19_positions import apply_rope, apply_rope_half, rope_tables

# group_of


@misconception(
    "group_of",
    "The heads take turns: 0, 1, 0, 1, ... Neighbors belong together, 0, 0, 1, 1, ...: a group is a block of query heads.",
)
def group_of__takes_turns(n_heads, n_kv_heads):
    right.group_of(n_heads, n_kv_heads)
    return torch.arange(n_heads) % n_kv_heads


@misconception(
    "group_of",
    "You divided by the number of groups. The number of heads *in* a group is what counts them off; the two agree only when "
    "H is the square of G.",
)
def group_of__divided_by_groups(n_heads, n_kv_heads):
    right.group_of(n_heads, n_kv_heads)
    return torch.arange(n_heads) // n_kv_heads


@misconception(
    "group_of",
    "These are groups of query heads turned around: one number per key/value head. The question is asked by each query head.",
)
def group_of__one_per_group(n_heads, n_kv_heads):
    right.group_of(n_heads, n_kv_heads)
    return torch.arange(n_kv_heads)


@misconception(
    "group_of",
    "The numbers of heads are not whole: the division left fractions, or the result is no LongTensor that can pick heads.",
)
def group_of__fractions(n_heads, n_kv_heads):
    right.group_of(n_heads, n_kv_heads)
    return torch.arange(n_heads) / (n_heads / n_kv_heads)


@misconception(
    "group_of",
    "Seven heads in two groups, and no complaint. The last group would be smaller, or a head would be read that is not there.",
)
def group_of__never_complains(n_heads, n_kv_heads):
    return torch.tensor([h * n_kv_heads // n_heads for h in range(n_heads)])


# repeat_kv


@misconception(
    "repeat_kv",
    "The whole row of heads was repeated: k0 k1 k0 k1. Query heads 0 and 1 share a head, so it has to be k0 k0 k1 k1. The shape "
    "is the same, and with one head nobody sees the difference.",
)
def repeat_kv__tiled(x, n_rep):
    return x if n_rep == 1 else x.repeat(1, n_rep, 1, 1)


@misconception(
    "repeat_kv",
    "Time steps were repeated instead of heads, as if x were (B, T, G, Dh): each head holds every place several times.",
)
def repeat_kv__time_steps(x, n_rep):
    if n_rep == 1:
        return x
    B, G, T, D = x.shape
    return x[:, :, :, None].expand(B, G, T, n_rep, D).reshape(B, G * n_rep, T, D)


@misconception(
    "repeat_kv",
    "The heads are right, but n_rep = 1 made a copy too. That is the case of every multi-head layer: give x back as it lies.",
)
def repeat_kv__always_copies(x, n_rep):
    B, G, T, D = x.shape
    return x[:, :, None].repeat(1, 1, n_rep, 1, 1).view(B, G * n_rep, T, D)


@misconception(
    "repeat_kv",
    "The copies have an axis of their own, (B, G, n_rep, T, Dh). They have to join the axis of the heads.",
)
def repeat_kv__own_axis(x, n_rep):
    return x if n_rep == 1 else x[:, :, None].expand(-1, -1, n_rep, -1, -1).clone()


@misconception(
    "repeat_kv",
    "The numbers of a head were repeated: it has become wider, and there are no more heads than before.",
)
def repeat_kv__wider(x, n_rep):
    return x if n_rep == 1 else x.repeat(1, 1, 1, n_rep)


@misconception(
    "repeat_kv",
    "No gradient comes back: the copies were cut off from x.",
)
def repeat_kv__cut_off(x, n_rep):
    return right.repeat_kv(x.detach(), n_rep)


# grouped_attention


def _wide(x):
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _attend(q, k, v, mask=None, scale=None, softmax=masked_softmax):
    """Right attention with as many heads in k and v as in q."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (_wide(q) * scale) @ _wide(k).mT
    return (softmax(scores, mask) @ _wide(v)).to(q.dtype)


def _grouped(q, k, v, mask=None, scale=None, softmax=masked_softmax):
    """Right, with a softmax that may be wrong; it sees scores (B, H, T, S)."""
    right._check_shapes(q, k, v)
    B, H, T, D = q.shape
    _, G, S, Dv = v.shape
    scale = D**-0.5 if scale is None else scale
    rows = q.reshape(B, G, H // G * T, D)
    scores = ((_wide(rows) * scale) @ _wide(k).mT).view(B, H, T, S)
    weights = softmax(scores, mask).view(B, G, H // G * T, S)
    return (weights @ _wide(v)).view(B, H, T, Dv).to(q.dtype)


@misconception(
    "grouped_attention",
    "Query heads 0, G, 2G, ... were put together. A group is made of neighbors: its axis comes first, the heads inside it second.",
)
def grouped_attention__heads_take_turns(q, k, v, mask=None, scale=None):
    right._check_shapes(q, k, v)
    B, H, T, D = q.shape
    G = k.shape[1]
    order = torch.arange(H, device=q.device).view(-1, G).T.flatten()
    back = order.argsort()
    if mask is not None and mask.dim() > 2 and mask.shape[-3] == H:
        mask = mask.index_select(-3, order)
    return right.grouped_attention(q[:, order], k, v, mask, scale)[:, back]


@misconception(
    "grouped_attention",
    "All query heads read key/value head 0. The other groups are never looked at.",
)
def grouped_attention__one_head_for_all(q, k, v, mask=None, scale=None):
    right._check_shapes(q, k, v)
    if k.shape[1] == q.shape[1]:
        return _grouped(q, k, v, mask, scale)
    return _grouped(q, k[:, :1], v[:, :1], mask, scale)


@misconception(
    "grouped_attention",
    "The keys are read by groups of neighbors, the values by heads that take turns. Both have to follow the same mapping.",
)
def grouped_attention__values_take_turns(q, k, v, mask=None, scale=None):
    right._check_shapes(q, k, v)
    H, G = q.shape[1], k.shape[1]
    heads = torch.arange(H, device=q.device)
    return _attend(q, k[:, heads // (H // G)], v[:, heads % G], mask, scale)


@misconception(
    "grouped_attention",
    "The numbers are right, but every key was copied for each query head that reads it. An expanded tensor that is flattened or "
    "reshaped across its new axis is a copy of the full size: two million bytes for one token where 33 thousand do.",
)
def grouped_attention__expanded(q, k, v, mask=None, scale=None):
    right._check_shapes(q, k, v)
    n_rep = q.shape[1] // k.shape[1]
    return _attend(q, right.repeat_kv(k, n_rep), right.repeat_kv(v, n_rep), mask, scale)


@misconception(
    "grouped_attention",
    "The numbers are right, and you repeated nothing yourself: you let the product broadcast k along an axis of size 1. A batched "
    "product needs its operands laid out, so it makes the copies before it starts. Give it more rows, not more matrices.",
)
def grouped_attention__broadcast_product(q, k, v, mask=None, scale=None):
    right._check_shapes(q, k, v)
    B, H, T, D = q.shape
    _, G, S, Dv = v.shape
    scale = D**-0.5 if scale is None else scale
    five = _wide(q).reshape(B, G, H // G, T, D) * scale
    scores = (five @ _wide(k)[:, :, None].mT).reshape(B, H, T, S)
    weights = masked_softmax(scores, mask).reshape(B, G, H // G, T, S)
    return (weights @ _wide(v)[:, :, None]).reshape(B, H, T, Dv).to(q.dtype)


@misconception(
    "grouped_attention",
    "The numbers are right, but k and v were copied once before they were read. In decoding they are the whole cache, and "
    "this doubles what every token has to move.",
)
def grouped_attention__copies_the_cache(q, k, v, mask=None, scale=None):
    return _grouped(q, k.clone(memory_format=torch.contiguous_format), v.clone(), mask, scale)


@misconception(
    "grouped_attention",
    "The mask of the first head of a group was used for all of its heads. A mask has a row for each *query* head.",
)
def grouped_attention__mask_of_the_group(q, k, v, mask=None, scale=None):
    def softmax(scores, mask):
        if mask is None:
            return masked_softmax(scores, None)
        B, H, T, S = scores.shape
        G = k.shape[1]
        full = torch.broadcast_to(mask, scores.shape).reshape(B, G, H // G, T, S)
        return masked_softmax(scores, full[:, :, :1].expand(full.shape).reshape(scores.shape))

    return _grouped(q, k, v, mask, scale, softmax)


@misconception(
    "grouped_attention",
    "The rows of scores go head by head, those of your mask query by query (or the other way round). With one mask for all heads "
    "each query gets the row of another one.",
)
def grouped_attention__mask_rows_mixed(q, k, v, mask=None, scale=None):
    def softmax(scores, mask):
        if mask is None:
            return masked_softmax(scores, None)
        B, H, T, S = scores.shape
        G = k.shape[1]
        full = torch.broadcast_to(mask, scores.shape).reshape(B, G, H // G, T, S)
        return masked_softmax(scores, full.transpose(2, 3).reshape(scores.shape))

    return _grouped(q, k, v, mask, scale, softmax)


@misconception(
    "grouped_attention",
    "The softmax went over all keys of all query heads of a group at once: the weights of one *group* sum to one.",
)
def grouped_attention__softmax_of_the_group(q, k, v, mask=None, scale=None):
    def softmax(scores, mask):
        B, H, T, S = scores.shape
        G = k.shape[1]
        joined = scores.view(B, G, H // G, T, S).transpose(2, 3).reshape(B, G, T, H // G * S)
        if mask is not None:
            mask = torch.broadcast_to(mask, scores.shape).reshape(B, G, H // G, T, S)
            mask = mask.transpose(2, 3).reshape(joined.shape)
        return masked_softmax(joined, mask).view(B, G, T, H // G, S).transpose(2, 3).reshape(scores.shape)

    return _grouped(q, k, v, mask, scale, softmax)


@misconception(
    "grouped_attention",
    "The scores are too small by the root of the group size: you scaled as if the heads of a group were one wide head. The width of "
    "a head did not change.",
)
def grouped_attention__scale_of_the_group(q, k, v, mask=None, scale=None):
    right._check_shapes(q, k, v)
    wide = q.shape[-1] * q.shape[1] // k.shape[1]
    return _grouped(q, k, v, mask, wide**-0.5 if scale is None else scale)


@misconception(
    "grouped_attention",
    "The default scale was taken from the width of the values. Scores are sums over the width of queries and keys.",
)
def grouped_attention__scale_of_the_values(q, k, v, mask=None, scale=None):
    return _grouped(q, k, v, mask, v.shape[-1] ** -0.5 if scale is None else scale)


@misconception(
    "grouped_attention",
    "A scale of 0 was taken for no scale. Zero is a number, and only None stands for the default.",
)
def grouped_attention__zero_is_none(q, k, v, mask=None, scale=None):
    return _grouped(q, k, v, mask, scale or None)


@misconception(
    "grouped_attention",
    "The scale that was handed in is not used.",
)
def grouped_attention__scale_ignored(q, k, v, mask=None, scale=None):
    return _grouped(q, k, v, mask)


@misconception(
    "grouped_attention",
    "The mask is used the other way round: True means that a query may look.",
)
def grouped_attention__true_hides(q, k, v, mask=None, scale=None):
    return _grouped(q, k, v, mask, scale, lambda s, m: masked_softmax(s, None if m is None else ~m))


@misconception(
    "grouped_attention",
    "The mask came after the softmax: what is hidden has kept its share, and the weights that are left do not sum to one.",
)
def grouped_attention__mask_after_softmax(q, k, v, mask=None, scale=None):
    def softmax(scores, mask):
        weights = masked_softmax(scores, None)
        if mask is None:
            return weights
        masked_softmax(scores, mask)
        return weights * mask

    return _grouped(q, k, v, mask, scale, softmax)


@misconception(
    "grouped_attention",
    "A query that sees nothing became NaN: the softmax of a row of -inf. It has to give zeros, forward and backward.",
)
def grouped_attention__nan_rows(q, k, v, mask=None, scale=None):
    def softmax(scores, mask):
        masked_softmax(scores, mask)
        return scores.softmax(-1) if mask is None else scores.masked_fill(~mask, -torch.inf).softmax(-1)

    return _grouped(q, k, v, mask, scale, softmax)


@misconception(
    "grouped_attention",
    "A query that sees nothing gets the average of all values: a large negative number, the same in the whole row, is a "
    "uniform softmax. It has to give zeros.",
)
def grouped_attention__average_rows(q, k, v, mask=None, scale=None):
    def softmax(scores, mask):
        masked_softmax(scores, mask)
        return scores.softmax(-1) if mask is None else scores.masked_fill(~mask, -1e30).softmax(-1)

    return _grouped(q, k, v, mask, scale, softmax)


@misconception(
    "grouped_attention",
    "Half inputs were multiplied in half precision. A score of 274.125 needs more bits than bfloat16 has.",
)
def grouped_attention__in_half(q, k, v, mask=None, scale=None):
    right._check_shapes(q, k, v)
    B, H, T, D = q.shape
    _, G, S, Dv = v.shape
    scale = D**-0.5 if scale is None else scale
    scores = ((q * scale).reshape(B, G, H // G * T, D) @ k.mT).view(B, H, T, S)
    weights = masked_softmax(_wide(scores), mask).to(q.dtype).view(B, G, H // G * T, S)
    return (weights @ v).view(B, H, T, Dv)


@misconception(
    "grouped_attention",
    "Half inputs came back as float32. The result has the dtype of q.",
)
def grouped_attention__stays_wide(q, k, v, mask=None, scale=None):
    return _grouped(_wide(q), _wide(k), _wide(v), mask, scale)


@misconception(
    "grouped_attention",
    "float64 went through float32 on its way: the last nine digits are noise.",
)
def grouped_attention__always_float(q, k, v, mask=None, scale=None):
    return _grouped(q.float(), k.float(), v.float(), mask, scale).to(q.dtype)


@misconception(
    "grouped_attention",
    "Your output has the axes (B, T, H, Dv). Heads stay in front of the tokens; merging them is the layer's job.",
)
def grouped_attention__tokens_first(q, k, v, mask=None, scale=None):
    return _grouped(q, k, v, mask, scale).transpose(1, 2)


@misconception(
    "grouped_attention",
    "Shapes that do not fit end in torch's own error, or in a result that should not exist. Compare them at the door.",
)
def grouped_attention__never_looks_at_shapes(q, k, v, mask=None, scale=None):
    B, H, T, D = q.shape
    _, G, S, Dv = v.shape
    scale = D**-0.5 if scale is None else scale
    rows = H // G * T
    scores = ((_wide(q).reshape(B, G, rows, D) * scale) @ _wide(k).mT).view(B, H, T, S)
    return (masked_softmax(scores, mask).view(B, G, rows, S) @ _wide(v)).view(B, H, T, Dv).to(q.dtype)


# GroupedQueryAttention


class _Layer(right.GroupedQueryAttention):
    """The right layer in steps that can go wrong one by one."""

    def split(self, x, n):
        return split_heads(x, n)

    def merge(self, x):
        return merge_heads(x)

    def where(self, x, cache, positions):
        start = 0 if cache is None else cache.length
        return torch.arange(start, start + x.shape[1], device=x.device) if positions is None else positions

    def tables(self, positions):
        return rope_tables(positions, self.head_dim, self.base)

    def turn(self, x, tables):
        return (apply_rope if self.layout == "interleaved" else apply_rope_half)(x, *tables)

    def store(self, cache, k, v):
        return cache.update(k, v)

    def allowed(self, T, S, mask, device):
        return combine_masks(causal_mask(T, S, device=device), mask)

    def mix(self, q, k, v, mask):
        return right.grouped_attention(q, k, v, mask)

    def forward(self, x, *, cache=None, mask=None, positions=None):
        tables = self.tables(self.where(x, cache, positions))
        q = self.turn(self.split(self.q_proj(x), self.n_heads), tables)
        k = self.turn(self.split(self.k_proj(x), self.n_kv_heads), tables)
        v = self.split(self.v_proj(x), self.n_kv_heads)
        if cache is not None:
            k, v = self.store(cache, k, v)
        out = self.mix(q, k, v, self.allowed(x.shape[1], k.shape[2], mask, x.device))
        return self.o_proj(self.merge(out))


@misconception(
    "GroupedQueryAttention",
    "The outputs are right, and the cache is as large as that of multi-head attention: keys and values were repeated before they "
    "were stored. Store the G heads; that is the whole point.",
)
class GroupedQueryAttention__expands_before_caching(_Layer):
    def store(self, cache, k, v):
        n_rep = self.n_heads // self.n_kv_heads
        return cache.update(right.repeat_kv(k, n_rep), right.repeat_kv(v, n_rep))


@misconception(
    "GroupedQueryAttention",
    "The cache is small and the outputs are right, but each step makes all heads of it again, at the full size of multi-head "
    "attention. Read the cache as it lies.",
)
class GroupedQueryAttention__expands_after_caching(_Layer):
    def mix(self, q, k, v, mask):
        n_rep = self.n_heads // self.n_kv_heads
        return _attend(q, right.repeat_kv(k, n_rep), right.repeat_kv(v, n_rep), mask)


@misconception(
    "GroupedQueryAttention",
    "Keys and values were tiled, k0 k1 k0 k1. Neighboring query heads share a head: k0 k0 k1 k1.",
)
class GroupedQueryAttention__tiled(_Layer):
    def mix(self, q, k, v, mask):
        return _attend(q, *(x.repeat(1, self.n_heads // self.n_kv_heads, 1, 1) for x in (k, v)), mask)


@misconception(
    "GroupedQueryAttention",
    "All heads are turned in interleaved pairs, whatever the layout says. Llama's weights want halves.",
)
class GroupedQueryAttention__always_interleaved(_Layer):
    def turn(self, x, tables):
        return apply_rope(x, *tables)


@misconception(
    "GroupedQueryAttention",
    "All heads are turned in halves, whatever the layout says.",
)
class GroupedQueryAttention__always_half(_Layer):
    def turn(self, x, tables):
        return apply_rope_half(x, *tables)


@misconception(
    "GroupedQueryAttention",
    "The base of the frequencies is 10,000 here, also where another one was asked for.",
)
class GroupedQueryAttention__base_ignored(_Layer):
    def tables(self, positions):
        return rope_tables(positions, self.head_dim)


@misconception(
    "GroupedQueryAttention",
    "The positions that were handed in are not used: tokens are counted from the length of the cache.",
)
class GroupedQueryAttention__positions_ignored(_Layer):
    def where(self, x, cache, positions):
        return super().where(x, cache, None)


@misconception(
    "GroupedQueryAttention",
    "Each chunk starts at position 0 again. The keys in the cache were turned by where they stand in the whole text, so the new "
    "queries and keys must be too.",
)
class GroupedQueryAttention__restarts_at_zero(_Layer):
    def where(self, x, cache, positions):
        return super().where(x, None, positions)


@misconception(
    "GroupedQueryAttention",
    "With one group for each head this is not the layer of yesterday: nothing is turned at all, so the layer cannot tell the order of "
    "its past.",
)
class GroupedQueryAttention__no_rotation(_Layer):
    def turn(self, x, tables):
        return x


@misconception(
    "GroupedQueryAttention",
    "Values were turned as well. Positions belong into the scores; what is mixed stays as it is.",
)
class GroupedQueryAttention__turns_values(_Layer):
    def forward(self, x, *, cache=None, mask=None, positions=None):
        tables = self.tables(self.where(x, cache, positions))
        q, k, v = (
            self.turn(self.split(layer(x), n), tables)
            for layer, n in (
                (self.q_proj, self.n_heads),
                (self.k_proj, self.n_kv_heads),
                (self.v_proj, self.n_kv_heads),
            )
        )
        if cache is not None:
            k, v = cache.update(k, v)
        out = self.mix(q, k, v, self.allowed(x.shape[1], k.shape[2], mask, x.device))
        return self.o_proj(self.merge(out))


@misconception(
    "GroupedQueryAttention",
    "Keys are stored as they were projected, and the whole cache is turned again at every step. That costs as much as the text is "
    "long, and with positions of one's own it goes wrong. Turn a key once, then store it.",
)
class GroupedQueryAttention__stores_raw_keys(_Layer):
    def forward(self, x, *, cache=None, mask=None, positions=None):
        if cache is None:
            return super().forward(x, mask=mask, positions=positions)
        where = self.where(x, cache, positions)
        q = self.turn(self.split(self.q_proj(x), self.n_heads), self.tables(where))
        k, v = (self.split(layer(x), self.n_kv_heads) for layer in (self.k_proj, self.v_proj))
        k, v = cache.update(k, v)
        k = self.turn(k, self.tables(torch.arange(k.shape[2], device=x.device)))
        return self.o_proj(self.merge(self.mix(q, k, v, self.allowed(x.shape[1], k.shape[2], mask, x.device))))


@misconception(
    "GroupedQueryAttention",
    "A mask took the place of causality. It may only forbid more: with a mask that is True everywhere, your queries see the "
    "future.",
)
class GroupedQueryAttention__mask_replaces_causality(_Layer):
    def allowed(self, T, S, mask, device):
        return super().allowed(T, S, None, device) if mask is None else mask


@misconception(
    "GroupedQueryAttention",
    "The mask that was handed in is not used.",
)
class GroupedQueryAttention__mask_ignored(_Layer):
    def allowed(self, T, S, mask, device):
        return super().allowed(T, S, None, device)


@misconception(
    "GroupedQueryAttention",
    "The triangle starts at the top left, so with a warm cache the newest query sees the oldest keys only. Its last row belongs to "
    "the last key.",
)
class GroupedQueryAttention__top_left(_Layer):
    def allowed(self, T, S, mask, device):
        return combine_masks(causal_mask(T, S, offset=0, device=device), mask)


@misconception(
    "GroupedQueryAttention",
    "With a warm cache there is no causal mask. For one token that is right; in a chunk of several, tokens see their future.",
)
class GroupedQueryAttention__no_mask_when_warm(_Layer):
    def allowed(self, T, S, mask, device):
        if S > T:
            return combine_masks(torch.ones(T, S, dtype=torch.bool, device=device), mask)
        return super().allowed(T, S, mask, device)


@misconception(
    "GroupedQueryAttention",
    "Nothing is causal here: every token sees the whole text.",
)
class GroupedQueryAttention__never_causal(_Layer):
    def allowed(self, T, S, mask, device):
        return mask


@misconception(
    "GroupedQueryAttention",
    "The scale was taken from d_model / n_heads. A head is head_dim wide, and that is what its scores are sums over.",
)
class GroupedQueryAttention__scale_of_the_model(_Layer):
    def mix(self, q, k, v, mask):
        return right.grouped_attention(q, k, v, mask, (self.q_proj.weight.shape[1] / self.n_heads) ** -0.5)


@misconception(
    "GroupedQueryAttention",
    "The scale was taken from the number of key/value heads, as if heads had become wider. The width of a head did not change.",
)
class GroupedQueryAttention__scale_of_the_groups(_Layer):
    def mix(self, q, k, v, mask):
        return right.grouped_attention(q, k, v, mask, (self.head_dim * self.n_heads / self.n_kv_heads) ** -0.5)


@misconception(
    "GroupedQueryAttention",
    "The rows were cut into heads without moving an axis: a head is made of pieces of several tokens.",
)
class GroupedQueryAttention__split_by_view(_Layer):
    def split(self, x, n):
        B, T, _ = x.shape
        return x.reshape(B, n, T, self.head_dim)


@misconception(
    "GroupedQueryAttention",
    "The heads were flattened while they stood in front of the tokens: a row of the result mixes several tokens.",
)
class GroupedQueryAttention__merged_by_view(_Layer):
    def merge(self, x):
        B, H, T, D = x.shape
        return x.reshape(B, T, H * D)


@misconception(
    "GroupedQueryAttention",
    "The projections of keys and values are as wide as that of the queries. There are G heads of each.",
)
class GroupedQueryAttention__wide_projections(_Layer):
    def __init__(self, d_model, n_heads, n_kv_heads, *, head_dim=None, base=10000.0, layout="interleaved"):
        super().__init__(d_model, n_heads, n_kv_heads, head_dim=head_dim, base=base, layout=layout)
        self.k_proj = nn.Linear(d_model, n_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, n_heads * self.head_dim, bias=False)


@misconception(
    "GroupedQueryAttention",
    "The four layers have biases, and the state dict holds more than four weights. Checkpoints of Llama have none.",
)
class GroupedQueryAttention__with_biases(_Layer):
    def __init__(self, d_model, n_heads, n_kv_heads, *, head_dim=None, base=10000.0, layout="interleaved"):
        super().__init__(d_model, n_heads, n_kv_heads, head_dim=head_dim, base=base, layout=layout)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            old = getattr(self, name)
            setattr(self, name, nn.Linear(old.in_features, old.out_features))


@misconception(
    "GroupedQueryAttention",
    "The frequencies are part of the state. They follow from base and head_dim; a checkpoint that was made elsewhere does not have them.",
)
class GroupedQueryAttention__stores_frequencies(_Layer):
    def __init__(self, d_model, n_heads, n_kv_heads, *, head_dim=None, base=10000.0, layout="interleaved"):
        super().__init__(d_model, n_heads, n_kv_heads, head_dim=head_dim, base=base, layout=layout)
        self.register_buffer("inv_freq", base ** (-torch.arange(0, self.head_dim, 2) / self.head_dim))


@misconception(
    "GroupedQueryAttention",
    "head_dim is not used: a head is d_model / n_heads wide, also where another width was asked for.",
)
class GroupedQueryAttention__head_dim_ignored(_Layer):
    def __init__(self, d_model, n_heads, n_kv_heads, *, head_dim=None, base=10000.0, layout="interleaved"):
        super().__init__(d_model, n_heads, n_kv_heads, base=base, layout=layout)


@misconception(
    "GroupedQueryAttention",
    "A layout that does not exist was taken for one of the two. A typing error should be refused, not obeyed.",
)
class GroupedQueryAttention__any_layout(_Layer):
    def __init__(self, d_model, n_heads, n_kv_heads, *, head_dim=None, base=10000.0, layout="interleaved"):
        super().__init__(d_model, n_heads, n_kv_heads, head_dim=head_dim, base=base)
        self.layout = layout


# gqa_costs


def _costs(params, cache_bytes, scores, projections):
    return {
        "params": params,
        "cache_bytes_per_token": cache_bytes,
        "decode_flops": projections + scores,
        "score_flops": scores,
    }


@misconception(
    "gqa_costs",
    "Your score FLOPs shrink with the groups. Every query still meets every key; what shrinks are projections and bytes.",
)
def gqa_costs__fewer_scores(d_model, n_heads, n_kv_heads, head_dim, length, dtype_bytes):
    params = 2 * d_model * head_dim * (n_heads + n_kv_heads)
    return _costs(params, 2 * n_kv_heads * head_dim * dtype_bytes, 4 * n_kv_heads * head_dim * (length + 1), 2 * params)


@misconception(
    "gqa_costs",
    "The new token sees itself too: after `length` cached tokens it meets length + 1 keys.",
)
def gqa_costs__not_itself(d_model, n_heads, n_kv_heads, head_dim, length, dtype_bytes):
    params = 2 * d_model * head_dim * (n_heads + n_kv_heads)
    return _costs(params, 2 * n_kv_heads * head_dim * dtype_bytes, 4 * n_heads * head_dim * length, 2 * params)


@misconception(
    "gqa_costs",
    "Only one of the two products of attention was counted: queries with keys, and then weights with values.",
)
def gqa_costs__one_product(d_model, n_heads, n_kv_heads, head_dim, length, dtype_bytes):
    params = 2 * d_model * head_dim * (n_heads + n_kv_heads)
    return _costs(params, 2 * n_kv_heads * head_dim * dtype_bytes, 2 * n_heads * head_dim * (length + 1), 2 * params)


@misconception(
    "gqa_costs",
    "A multiplication with its addition counts as two operations; you counted it as one.",
)
def gqa_costs__one_per_multiply_add(d_model, n_heads, n_kv_heads, head_dim, length, dtype_bytes):
    params = 2 * d_model * head_dim * (n_heads + n_kv_heads)
    return _costs(params, 2 * n_kv_heads * head_dim * dtype_bytes, 2 * n_heads * head_dim * (length + 1), params)


@misconception(
    "gqa_costs",
    "decode_flops is the attention alone. The four projections of the token belong to it.",
)
def gqa_costs__no_projections(d_model, n_heads, n_kv_heads, head_dim, length, dtype_bytes):
    params = 2 * d_model * head_dim * (n_heads + n_kv_heads)
    return _costs(params, 2 * n_kv_heads * head_dim * dtype_bytes, 4 * n_heads * head_dim * (length + 1), 0)


@misconception(
    "gqa_costs",
    "The projections were counted for all tokens of the text. The cached ones were projected before; one token is new.",
)
def gqa_costs__projects_the_past(d_model, n_heads, n_kv_heads, head_dim, length, dtype_bytes):
    params = 2 * d_model * head_dim * (n_heads + n_kv_heads)
    scores = 4 * n_heads * head_dim * (length + 1)
    return _costs(params, 2 * n_kv_heads * head_dim * dtype_bytes, scores, 2 * params * (length + 1))


@misconception(
    "gqa_costs",
    "The bytes are those of multi-head attention: the cache holds n_kv_heads heads, not n_heads.",
)
def gqa_costs__cache_of_all_heads(d_model, n_heads, n_kv_heads, head_dim, length, dtype_bytes):
    params = 2 * d_model * head_dim * (n_heads + n_kv_heads)
    return _costs(params, 2 * n_heads * head_dim * dtype_bytes, 4 * n_heads * head_dim * (length + 1), 2 * params)


@misconception(
    "gqa_costs",
    "The cache holds keys *and* values: twice what you found.",
)
def gqa_costs__keys_only(d_model, n_heads, n_kv_heads, head_dim, length, dtype_bytes):
    params = 2 * d_model * head_dim * (n_heads + n_kv_heads)
    return _costs(params, n_kv_heads * head_dim * dtype_bytes, 4 * n_heads * head_dim * (length + 1), 2 * params)


@misconception(
    "gqa_costs",
    "These are numbers, not bytes: each takes dtype_bytes.",
)
def gqa_costs__no_bytes(d_model, n_heads, n_kv_heads, head_dim, length, dtype_bytes):
    params = 2 * d_model * head_dim * (n_heads + n_kv_heads)
    return _costs(params, 2 * n_kv_heads * head_dim, 4 * n_heads * head_dim * (length + 1), 2 * params)


@misconception(
    "gqa_costs",
    "The bytes are those of the whole text. What was asked for is one token; the text is a factor for later.",
)
def gqa_costs__bytes_of_the_text(d_model, n_heads, n_kv_heads, head_dim, length, dtype_bytes):
    params = 2 * d_model * head_dim * (n_heads + n_kv_heads)
    scores = 4 * n_heads * head_dim * (length + 1)
    return _costs(params, 2 * n_kv_heads * head_dim * dtype_bytes * length, scores, 2 * params)


@misconception(
    "gqa_costs",
    "The projections of queries and outputs were taken to be d_model by d_model. All query heads together are n_heads * head_dim wide, "
    "and that may be another number.",
)
def gqa_costs__square_projections(d_model, n_heads, n_kv_heads, head_dim, length, dtype_bytes):
    params = 2 * d_model * (d_model + head_dim * n_kv_heads)
    return _costs(params, 2 * n_kv_heads * head_dim * dtype_bytes, 4 * n_heads * head_dim * (length + 1), 2 * params)


@misconception(
    "gqa_costs",
    "The output projection is missing among the weights.",
)
def gqa_costs__no_output(d_model, n_heads, n_kv_heads, head_dim, length, dtype_bytes):
    params = d_model * head_dim * (n_heads + 2 * n_kv_heads)
    return _costs(params, 2 * n_kv_heads * head_dim * dtype_bytes, 4 * n_heads * head_dim * (length + 1), 2 * params)


@misconception(
    "gqa_costs",
    "The weights are those of multi-head attention. The projections of keys and values make n_kv_heads heads each.",
)
def gqa_costs__params_of_all_heads(d_model, n_heads, n_kv_heads, head_dim, length, dtype_bytes):
    params = 4 * d_model * head_dim * n_heads
    return _costs(params, 2 * n_kv_heads * head_dim * dtype_bytes, 4 * n_heads * head_dim * (length + 1), 2 * params)


# gqa_equivalent_mha


def _written_out(state, n_heads, n_kv_heads, expand, names=("k_proj.", "v_proj.")):
    right.group_of(n_heads, n_kv_heads)
    n_rep = n_heads // n_kv_heads
    return {name: expand(w, n_rep) if name.startswith(names) else w for name, w in state.items()}


@misconception(
    "gqa_equivalent_mha",
    "The block of all heads was repeated as a whole: k0 k1 k0 k1. Neighbors shared a head, so each head is repeated where it stands.",
)
def gqa_equivalent_mha__tiled(state, n_heads, n_kv_heads):
    return _written_out(state, n_heads, n_kv_heads, lambda w, n: torch.cat([w] * n))


@misconception(
    "gqa_equivalent_mha",
    "Single rows were repeated, not heads: a head is Dh rows that have to stay together.",
)
def gqa_equivalent_mha__rows(state, n_heads, n_kv_heads):
    return _written_out(state, n_heads, n_kv_heads, lambda w, n: w.repeat_interleave(n, 0))


@misconception(
    "gqa_equivalent_mha",
    "The values were left as they were: v_proj has still G heads.",
)
def gqa_equivalent_mha__keys_only(state, n_heads, n_kv_heads):
    def expand(w, n):
        return w.unflatten(0, (n_kv_heads, -1)).repeat_interleave(n, 0).flatten(0, 1)

    return _written_out(state, n_heads, n_kv_heads, expand, ("k_proj.",))


@misconception(
    "gqa_equivalent_mha",
    "The weights are right, and the biases of keys and values still have G heads.",
)
def gqa_equivalent_mha__no_biases(state, n_heads, n_kv_heads):
    def expand(w, n):
        return w.unflatten(0, (n_kv_heads, -1)).repeat_interleave(n, 0).flatten(0, 1)

    return _written_out(state, n_heads, n_kv_heads, expand, ("k_proj.weight", "v_proj.weight"))


@misconception(
    "gqa_equivalent_mha",
    "The copies were divided by their number. Nothing is summed over them: each query head reads one, at its full size.",
)
def gqa_equivalent_mha__divided(state, n_heads, n_kv_heads):
    def expand(w, n):
        return w.unflatten(0, (n_kv_heads, -1)).repeat_interleave(n, 0).flatten(0, 1) / n

    return _written_out(state, n_heads, n_kv_heads, expand)


@misconception(
    "gqa_equivalent_mha",
    "The wide tensors were written into the state that was given. The layer that it belongs to still needs it.",
)
def gqa_equivalent_mha__into_the_given(state, n_heads, n_kv_heads):
    state.update(right.gqa_equivalent_mha(state, n_heads, n_kv_heads))
    return state


@misconception(
    "gqa_equivalent_mha",
    "Groups of unequal size were written out without a word.",
)
def gqa_equivalent_mha__never_complains(state, n_heads, n_kv_heads):
    def expand(w):
        head = torch.arange(n_heads, device=w.device) * n_kv_heads // n_heads
        return w.unflatten(0, (n_kv_heads, -1))[head].flatten(0, 1)

    return {name: expand(w) if name.startswith(("k_proj.", "v_proj.")) else w for name, w in state.items()}


# shard


def _part(state, n_heads, n_kv_heads, world, rank, mine=None, theirs=None):
    """The right part, or one with other heads."""
    right.shard(state, n_heads, n_kv_heads, world, rank)
    size = n_heads // world
    mine = list(range(rank * size, rank * size + size)) if mine is None else mine
    theirs = sorted({h * n_kv_heads // n_heads for h in mine}) if theirs is None else theirs

    def rows(w, n, heads):
        return w.unflatten(0, (n, -1))[list(heads)].flatten(0, 1)

    part = {}
    for name, w in state.items():
        if name == "o_proj.weight":
            part[name] = rows(w.T, n_heads, mine).T
        else:
            part[name] = rows(w, n_heads, mine) if name.startswith("q_proj") else rows(w, n_kv_heads, theirs)
    return part


@misconception(
    "shard",
    "With more ranks than key/value heads, rank r got head r % G. Its queries belong to a group, and the ranks of a group are neighbors.",
)
def shard__copies_take_turns(state, n_heads, n_kv_heads, world, rank):
    theirs = [rank % n_kv_heads] if world > n_kv_heads else None
    return _part(state, n_heads, n_kv_heads, world, rank, theirs=theirs)


@misconception(
    "shard",
    "Query heads were dealt out like cards, rank r, r + world, ..., while key/value heads were cut into blocks. The queries of a rank "
    "meet keys that are not theirs.",
)
def shard__dealt_out(state, n_heads, n_kv_heads, world, rank):
    right.shard(state, n_heads, n_kv_heads, world, rank)
    size = n_heads // world
    theirs = sorted({h * n_kv_heads // n_heads for h in range(rank * size, rank * size + size)})
    return _part(state, n_heads, n_kv_heads, world, rank, list(range(rank, n_heads, world)), theirs)


@misconception(
    "shard",
    "Key/value heads were dealt out, rank r, r + world, ..., while query heads were cut into blocks. A rank has to hold the heads that "
    "its queries read.",
)
def shard__keys_dealt_out(state, n_heads, n_kv_heads, world, rank):
    theirs = list(range(rank, n_kv_heads, world)) if world <= n_kv_heads else None
    return _part(state, n_heads, n_kv_heads, world, rank, theirs=theirs)


@misconception(
    "shard",
    "Every rank holds all key/value heads. Nothing is saved that way, and inside a rank the queries count their groups anew and read "
    "the wrong ones.",
)
def shard__all_keys(state, n_heads, n_kv_heads, world, rank):
    return _part(state, n_heads, n_kv_heads, world, rank, theirs=range(n_kv_heads))


@misconception(
    "shard",
    "The rows of k_proj and v_proj were cut into as many pieces as there are ranks, and with more ranks than heads a piece is a "
    "fraction of a head. From there on heads are copied whole.",
)
def shard__fractions_of_heads(state, n_heads, n_kv_heads, world, rank):
    part = _part(state, n_heads, n_kv_heads, world, rank)
    for name, w in state.items():
        if name.startswith(("k_proj", "v_proj")):
            part[name] = w.chunk(world)[rank]
    return part


@misconception(
    "shard",
    "o_proj was cut by rows: a rank would make a piece of the output from all heads. It reads heads, so they are its columns.",
)
def shard__rows_of_the_output(state, n_heads, n_kv_heads, world, rank):
    part = _part(state, n_heads, n_kv_heads, world, rank)
    part["o_proj.weight"] = state["o_proj.weight"].tensor_split(world)[rank]
    return part


@misconception(
    "shard",
    "o_proj is whole on every rank. A rank has only its own heads to put into it.",
)
def shard__whole_output(state, n_heads, n_kv_heads, world, rank):
    return _part(state, n_heads, n_kv_heads, world, rank) | {"o_proj.weight": state["o_proj.weight"]}


@misconception(
    "shard",
    "The biases were handed to every rank whole. They have a number for each row of their weight, and are cut like it.",
)
def shard__whole_biases(state, n_heads, n_kv_heads, world, rank):
    part = _part(state, n_heads, n_kv_heads, world, rank)
    return part | {name: w for name, w in state.items() if name.endswith("bias")}


@misconception(
    "shard",
    "o_proj was divided by the number of ranks. Their outputs are sums over different heads: added up, they are complete.",
)
def shard__averaged(state, n_heads, n_kv_heads, world, rank):
    part = _part(state, n_heads, n_kv_heads, world, rank)
    return part | {"o_proj.weight": part["o_proj.weight"] / world}


@misconception(
    "shard",
    "Ranks outside of the world got a part: with -1 the last one, since Python counts from the end.",
)
def shard__any_rank(state, n_heads, n_kv_heads, world, rank):
    return right.shard(state, n_heads, n_kv_heads, world, rank % world)


@misconception(
    "shard",
    "A world that does not fit was served: heads were left out, or the heads of one rank read from groups of unequal size.",
)
def shard__any_world(state, n_heads, n_kv_heads, world, rank):
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}")
    if n_heads % world == 0 and n_heads % n_kv_heads == 0 and 0 in (n_kv_heads % world, world % n_kv_heads):
        return right.shard(state, n_heads, n_kv_heads, world, rank)
    mine = [h for h in range(n_heads) if h * world // n_heads == rank]
    return {name: w[: len(mine)] for name, w in state.items()}


# best_grouping


def _distances(heads):
    """Squared distances between all pairs of rows."""
    return (heads[:, None] - heads).square().sum(-1)


def _on(x, *layers, n):
    """The heads of some layers on x, (H, everything)."""
    with torch.no_grad():
        return torch.cat([split_heads(layer(x).double(), n) for layer in layers], -1).transpose(0, 1).flatten(1)


def _best(distance, n_kv_heads, power=1.0):
    """The order with the smallest sum of distances inside groups."""
    H = len(distance)
    size = right._group_size(H, n_kv_heads)
    distance = distance.pow(power).tolist()

    def best(left):
        if not left:
            return 0.0, ()
        found = []
        for others in combinations(left[1:], size - 1):
            group = (left[0], *others)
            cost, order = best(tuple(h for h in left if h not in group))
            found.append((cost + sum(distance[a][b] for a, b in combinations(group, 2)), group + order))
        return min(found)

    return torch.tensor(best(tuple(range(H)))[1])


@misconception(
    "best_grouping",
    "The heads stayed where they were. Neighbors in a trained model have nothing in common but their number.",
)
def best_grouping__as_they_are(module, x, n_kv_heads):
    right._group_size(module.n_heads, n_kv_heads)
    return torch.arange(module.n_heads, device=x.device)


@misconception(
    "best_grouping",
    "You compared weights. Where the input never goes, weights may differ as they like: compare what they make of x.",
)
def best_grouping__weights(module, x, n_kv_heads):
    heads = torch.cat(
        [layer.weight.detach().unflatten(0, (module.n_heads, -1)) for layer in (module.k_proj, module.v_proj)], 1
    )
    return _best(_distances(heads.double().flatten(1)), n_kv_heads).to(x.device)


@misconception(
    "best_grouping",
    "Only the keys were compared. Heads that share keys share values too.",
)
def best_grouping__keys_only(module, x, n_kv_heads):
    return _best(_distances(_on(x, module.k_proj, n=module.n_heads)), n_kv_heads).to(x.device)


@misconception(
    "best_grouping",
    "Only the values were compared. The keys decide where a head looks.",
)
def best_grouping__values_only(module, x, n_kv_heads):
    return _best(_distances(_on(x, module.v_proj, n=module.n_heads)), n_kv_heads).to(x.device)


@misconception(
    "best_grouping",
    "Each head in turn took what was nearest to it. The last ones got what nobody wanted: a slightly worse first pair can make the "
    "whole much better.",
)
def best_grouping__nearest_first(module, x, n_kv_heads):
    size = right._group_size(module.n_heads, n_kv_heads)
    distance = _distances(_on(x, module.k_proj, module.v_proj, n=module.n_heads)).tolist()
    left, order = list(range(module.n_heads)), []
    while left:
        first = left[0]
        group = sorted(left, key=lambda h: (h != first, distance[first][h]))[:size]
        order += sorted(group)
        left = [h for h in left if h not in group]
    return torch.tensor(order, device=x.device)


@misconception(
    "best_grouping",
    "This order is the other way round: place i holds the place that head i goes to, not the head that goes to place i.",
)
def best_grouping__inverse(module, x, n_kv_heads):
    return right.best_grouping(module, x, n_kv_heads).argsort()


@misconception(
    "best_grouping",
    "Heads were sorted by their size and cut into groups. Two vectors of the same length can point anywhere.",
)
def best_grouping__by_size(module, x, n_kv_heads):
    size = right._group_size(module.n_heads, n_kv_heads)
    order = _on(x, module.k_proj, module.v_proj, n=module.n_heads).norm(dim=-1).argsort().tolist()
    groups = sorted(sorted(order[i : i + size]) for i in range(0, len(order), size))
    return torch.tensor(groups, device=x.device).flatten()


@misconception(
    "best_grouping",
    "Plain distances were summed. The loss of a mean is in squares: one far head costs more than two that are half as far.",
)
def best_grouping__not_squared(module, x, n_kv_heads):
    distance = _distances(_on(x, module.k_proj, module.v_proj, n=module.n_heads))
    return _best(distance, n_kv_heads, power=0.5).to(x.device)


@misconception(
    "best_grouping",
    "The groups are the best ones, but their order is not the one that was asked for: heads ascend inside a group, and groups ascend "
    "by their first head.",
)
def best_grouping__descending(module, x, n_kv_heads):
    order = right.best_grouping(module, x, n_kv_heads)
    return order.view(n_kv_heads, -1).flip(1).flatten()


@misconception(
    "best_grouping",
    "Directions were compared and lengths were not. A head that is twice as long as another differs from it.",
)
def best_grouping__directions(module, x, n_kv_heads):
    heads = _on(x, module.k_proj, module.v_proj, n=module.n_heads)
    return _best(
        1 - (heads / heads.norm(dim=-1, keepdim=True)) @ (heads / heads.norm(dim=-1, keepdim=True)).T, n_kv_heads
    )


@misconception(
    "best_grouping",
    "Six heads in four groups, and no complaint.",
)
def best_grouping__never_complains(module, x, n_kv_heads):
    if n_kv_heads < 1 or module.n_heads % n_kv_heads:
        return torch.arange(module.n_heads, device=x.device)
    return right.best_grouping(module, x, n_kv_heads)
