"""Day 18: known wrong solutions, each with the sentence for whoever wrote it."""

import copy

import torch
from torch import nn

from checker.testing import misconception
from reference.day01_tensor_basics import merge_heads, split_heads
from reference.day08_linear_layers import Linear
from reference.day16_scaled_dot_product import attention
from reference.day18_multi_head import MultiHeadAttention as Right
from reference.day18_multi_head import canonicalize as right_canonicalize
from reference.day18_multi_head import from_torch as right_from_torch
from reference.day18_multi_head import head_contributions as right_contributions
from reference.day18_multi_head import prune_heads as right_prune_heads
from reference.day18_multi_head import stack_heads as right_stack_heads

# head_widths


def _at_least_one(n_heads):
    if n_heads < 1:
        raise ValueError(f"n_heads {n_heads}")


def _share(d_model, n_heads):
    if d_model % n_heads:
        raise ValueError(f"{d_model} {n_heads}")
    return d_model // n_heads


@misconception(
    "head_widths",
    "A width that does not divide was rounded down in silence. 10 features in 3 heads of 3 leave one that nobody reads, and no "
    "shape will ever complain.",
)
def head_widths__rounds_down(d_model, n_heads, d_head=None, d_v=None):
    _at_least_one(n_heads)
    d_head = d_model // n_heads if d_head is None else d_head
    return d_head, d_head if d_v is None else d_v


@misconception(
    "head_widths",
    "You refuse widths that are given because d_model does not divide by the number of heads. Who names d_head has decided: "
    "n_heads * d_head need not be d_model at all.",
)
def head_widths__always_divides(d_model, n_heads, d_head=None, d_v=None):
    _at_least_one(n_heads)
    share = _share(d_model, n_heads)
    d_head = share if d_head is None else d_head
    return d_head, d_head if d_v is None else d_v


@misconception(
    "head_widths",
    "The values fell back to d_model / n_heads. Where d_v is left open, they are as wide as queries and keys are, also if that "
    "width was given.",
)
def head_widths__values_share_the_model(d_model, n_heads, d_head=None, d_v=None):
    _at_least_one(n_heads)
    share = _share(d_model, n_heads) if d_head is None else d_model // n_heads
    return share if d_head is None else d_head, share if d_v is None else d_v


@misconception(
    "head_widths",
    "d_v is ignored. Scores never see the values, so nothing forces them to be as wide as the queries.",
)
def head_widths__values_as_wide_as_queries(d_model, n_heads, d_head=None, d_v=None):
    _at_least_one(n_heads)
    d_head = _share(d_model, n_heads) if d_head is None else d_head
    return d_head, d_head


@misconception(
    "head_widths",
    "d_head is ignored: the model is divided by the number of heads whatever was asked for.",
)
def head_widths__ignores_d_head(d_model, n_heads, d_head=None, d_v=None):
    _at_least_one(n_heads)
    share = _share(d_model, n_heads) if d_head is None else d_model // n_heads
    return share, (d_head or share) if d_v is None else d_v


@misconception(
    "head_widths",
    "The two widths came out in the wrong order: queries and keys first, then values.",
)
def head_widths__values_first(d_model, n_heads, d_head=None, d_v=None):
    _at_least_one(n_heads)
    d_head = _share(d_model, n_heads) if d_head is None else d_head
    return d_head if d_v is None else d_v, d_head


@misconception(
    "head_widths",
    "No heads, or fewer than none, got through or died in a division. Say at the door what is wrong with the number.",
)
def head_widths__any_number_of_heads(d_model, n_heads, d_head=None, d_v=None):
    d_head = _share(d_model, n_heads) if d_head is None else d_head
    return d_head, d_head if d_v is None else d_v


@misconception(
    "head_widths",
    "The division gave a float. A width is a count: 4.0 features cannot be the size of a tensor.",
)
def head_widths__floats(d_model, n_heads, d_head=None, d_v=None):
    _at_least_one(n_heads)
    if d_head is None:
        _share(d_model, n_heads)
        d_head = d_model / n_heads
    return d_head, d_head if d_v is None else d_v


# mha_costs


def _costs(d_model, h, dh, dv, t, bias, *, mac=2, qk=2, o=True, score_heads=None, flops_per_token=True, biases=None):
    widths = qk * h * dh + h * dv
    weights = d_model * (widths + (h * dv if o else 0))
    biases = widths + d_model if biases is None else biases
    score_heads = h if score_heads is None else score_heads
    flops = mac * (t if flops_per_token else 1) * weights + mac * score_heads * t * t * (dh + dv)
    return {"params": weights + (biases if bias else 0), "flops": flops}


@misconception(
    "mha_costs",
    "Your FLOPs are half of what the meter finds: a multiplication and the addition after it are two operations.",
)
def mha_costs__one_operation(d_model, n_heads, d_head, d_v, t, bias):
    return _costs(d_model, n_heads, d_head, d_v, t, bias, mac=1)


@misconception(
    "mha_costs",
    "One of the four projections is missing: what leaves the heads goes through a matrix of its own, as large as that of the "
    "values.",
)
def mha_costs__no_output_map(d_model, n_heads, d_head, d_v, t, bias):
    return _costs(d_model, n_heads, d_head, d_v, t, bias, o=False)


@misconception(
    "mha_costs",
    "Queries or keys are missing: each token needs both, and both have the width d_head in each head.",
)
def mha_costs__queries_or_keys(d_model, n_heads, d_head, d_v, t, bias):
    return _costs(d_model, n_heads, d_head, d_v, t, bias, qk=1)


@misconception(
    "mha_costs",
    "You counted four square matrices. That holds only where n_heads * d_head and n_heads * d_v are both d_model.",
)
def mha_costs__four_squares(d_model, n_heads, d_head, d_v, t, bias):
    attention = 2 * n_heads * t * t * (d_head + d_v)
    params = 4 * d_model * d_model + (4 * d_model if bias else 0)
    return {"params": params, "flops": 8 * t * d_model * d_model + attention}


@misconception(
    "mha_costs",
    "The tables of scores were counted for one head. There are n_heads of them.",
)
def mha_costs__scores_of_one_head(d_model, n_heads, d_head, d_v, t, bias):
    return _costs(d_model, n_heads, d_head, d_v, t, bias, score_heads=1)


@misconception(
    "mha_costs",
    "The projections were counted for a single token. Each of the t tokens goes through all four of them.",
)
def mha_costs__projections_of_one_token(d_model, n_heads, d_head, d_v, t, bias):
    return _costs(d_model, n_heads, d_head, d_v, t, bias, flops_per_token=False)


@misconception(
    "mha_costs",
    "The FLOPs are those of the projections alone. Every token also meets every other, once for its score and once for its value.",
)
def mha_costs__no_scores(d_model, n_heads, d_head, d_v, t, bias):
    return _costs(d_model, n_heads, d_head, d_v, t, bias, score_heads=0)


@misconception(
    "mha_costs",
    "The FLOPs are those of scores and mixtures alone. For short sequences the four projections are the larger part.",
)
def mha_costs__no_projections(d_model, n_heads, d_head, d_v, t, bias):
    return {
        "params": _costs(d_model, n_heads, d_head, d_v, t, bias)["params"],
        "flops": 2 * n_heads * t * t * (d_head + d_v),
    }


@misconception(
    "mha_costs",
    "Biases are always counted. Ask for `bias` first.",
)
def mha_costs__always_biases(d_model, n_heads, d_head, d_v, t, bias):
    return _costs(d_model, n_heads, d_head, d_v, t, True)


@misconception(
    "mha_costs",
    "Biases are never counted. With bias=True each projection has one number per output.",
)
def mha_costs__no_biases(d_model, n_heads, d_head, d_v, t, bias):
    return _costs(d_model, n_heads, d_head, d_v, t, False)


@misconception(
    "mha_costs",
    "The bias of the output map is missing; the three others are there.",
)
def mha_costs__no_output_bias(d_model, n_heads, d_head, d_v, t, bias):
    return _costs(d_model, n_heads, d_head, d_v, t, bias, biases=n_heads * (2 * d_head + d_v))


@misconception(
    "mha_costs",
    "You gave each projection d_model biases. A bias belongs to an output, and three of the projections have other numbers of "
    "outputs.",
)
def mha_costs__biases_of_the_inputs(d_model, n_heads, d_head, d_v, t, bias):
    return _costs(d_model, n_heads, d_head, d_v, t, bias, biases=4 * d_model)


@misconception(
    "mha_costs",
    "The additions of the biases are among your FLOPs. Only matrix products are counted.",
)
def mha_costs__adds_the_biases(d_model, n_heads, d_head, d_v, t, bias):
    costs = _costs(d_model, n_heads, d_head, d_v, t, bias)
    more = t * (n_heads * (2 * d_head + d_v) + d_model) if bias else 0
    return {"params": costs["params"], "flops": costs["flops"] + more}


@misconception(
    "mha_costs",
    "The backward pass is in your count. One forward pass was asked for.",
)
def mha_costs__backward_too(d_model, n_heads, d_head, d_v, t, bias):
    return _costs(d_model, n_heads, d_head, d_v, t, bias, mac=6)


# MultiHeadAttention


class _Layer(nn.Module):
    """The right module in steps, each of which a mistake can replace."""

    rounds_down = False

    def __init__(self, d_model, n_heads, *, d_head=None, d_v=None, bias=False, d_context=None):
        super().__init__()
        _at_least_one(n_heads)
        if d_head is None:
            d_head = d_model // n_heads if self.rounds_down else _share(d_model, n_heads)
        self.sizes(d_model, n_heads, d_head, d_head if d_v is None else d_v)
        self.build(d_model, d_model if d_context is None else d_context, bias)

    def sizes(self, d_model, n_heads, d_head, d_v):
        self.d_model, self.n_heads, self.d_head, self.d_v = d_model, n_heads, d_head, d_v

    def build(self, d_model, d_context, bias):
        self.q_proj = Linear(d_model, self.n_heads * self.d_head, bias)
        self.k_proj = Linear(d_context, self.n_heads * self.d_head, bias)
        self.v_proj = Linear(d_context, self.n_heads * self.d_v, bias)
        self.o_proj = Linear(self.n_heads * self.d_v, d_model, bias)

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        self.fits(x, context)
        q, k, v = self.project(x, context)
        q, k, v = self.split(q), self.split(k), self.split(v)
        return self.output(self.merge(self.attend(q, k, v, self.mask(mask))))

    def fits(self, x, context):
        if x.shape[0] != context.shape[0]:
            raise ValueError(f"{tuple(x.shape)} {tuple(context.shape)}")

    def project(self, x, context):
        return self.q_proj(x), self.k_proj(context), self.v_proj(context)

    def split(self, x):
        return split_heads(x, self.n_heads)

    def mask(self, mask):
        return mask

    def attend(self, q, k, v, mask):
        return attention(q, k, v, mask, self.scale())[0]

    def scale(self):
        return None

    def merge(self, x):
        return merge_heads(x)

    def output(self, x):
        return self.o_proj(x)


@misconception(
    "MultiHeadAttention",
    "Your heads were cut out by a reshape to (B, H, T, Dh) alone. That keeps the order of the numbers in memory, so a head gets "
    "pieces of several tokens: it trains on easy tasks all the same, and only a comparison of numbers finds it.",
)
class MultiHeadAttention__reshape_alone(_Layer):
    def split(self, x):
        B, T, width = x.shape
        return x.reshape(B, self.n_heads, T, width // self.n_heads)


@misconception(
    "MultiHeadAttention",
    "The heads were put together without bringing the tokens back in front: where features of head 1 should be, there are "
    "later tokens of head 0.",
)
class MultiHeadAttention__merge_alone(_Layer):
    def merge(self, x):
        B, H, T, Dv = x.shape
        return x.reshape(B, T, H * Dv)


@misconception(
    "MultiHeadAttention",
    "Your heads take every H-th feature. The rows of a head stand together: features 0 to Dh - 1 are head 0.",
)
class MultiHeadAttention__strided_heads(_Layer):
    def split(self, x):
        B, T, width = x.shape
        return x.reshape(B, T, width // self.n_heads, self.n_heads).permute(0, 3, 1, 2)


@misconception(
    "MultiHeadAttention",
    "What enters o_proj is in the wrong order: feature by feature through all heads, not head by head.",
)
class MultiHeadAttention__merge_feature_first(_Layer):
    def merge(self, x):
        return x.permute(0, 2, 3, 1).flatten(2)


@misconception(
    "MultiHeadAttention",
    "Your scores are divided by sqrt(d_model). A dot product of one head has Dh terms; with d_model the softmax is flatter by "
    "the root of d_model / Dh.",
)
class MultiHeadAttention__scale_of_the_model(_Layer):
    def scale(self):
        return self.d_model**-0.5


@misconception(
    "MultiHeadAttention",
    "The scale was taken before the heads were split: it is that of all heads together, flatter by the root of H.",
)
class MultiHeadAttention__scale_of_all_heads(_Layer):
    def scale(self):
        return (self.n_heads * self.d_head) ** -0.5


@misconception(
    "MultiHeadAttention",
    "The scale is d_model / n_heads to the power of -1/2. Heads may have another width, and the dot products run over that.",
)
class MultiHeadAttention__scale_of_a_share(_Layer):
    def scale(self):
        return (self.d_model / self.n_heads) ** -0.5


@misconception(
    "MultiHeadAttention",
    "The scale was taken from the width of the values, which have no part in the scores.",
)
class MultiHeadAttention__scale_of_the_values(_Layer):
    def scale(self):
        return self.d_v**-0.5


@misconception(
    "MultiHeadAttention",
    "The scores are not scaled.",
)
class MultiHeadAttention__no_scale(_Layer):
    def scale(self):
        return 1.0


@misconception(
    "MultiHeadAttention",
    "The heads were averaged: your numbers are H times too small. Concatenating and mixing by W_O is the same as adding up what "
    "each head sends through its own columns.",
)
class MultiHeadAttention__averages_heads(_Layer):
    def output(self, x):
        return self.o_proj(x / self.n_heads)


@misconception(
    "MultiHeadAttention",
    "All heads share one table of weights here: the queries were never split. With one head this is right, so test with two.",
)
class MultiHeadAttention__one_table(_Layer):
    def attend(self, q, k, v, mask):
        whole = merge_heads(q)[:, None], merge_heads(k)[:, None]
        return attention(*whole, v, mask, self.d_head**-0.5)[0]


@misconception(
    "MultiHeadAttention",
    "The heads attend to each other at each place, not the tokens: the softmax ran over H keys.",
)
class MultiHeadAttention__heads_attend_to_heads(_Layer):
    def attend(self, q, k, v, mask):
        return attention(*(x.transpose(1, 2) for x in (q, k, v)), None)[0].transpose(1, 2)


@misconception(
    "MultiHeadAttention",
    "A width that does not divide was rounded down in silence. 10 features in 3 heads of 3 leave one that no head has.",
)
class MultiHeadAttention__rounds_down(_Layer):
    rounds_down = True


@misconception(
    "MultiHeadAttention",
    "A mask with two axes was taken for (B, S). It stretches to (B, H, T, S) from the right, so two axes are (T, S); with as many "
    "sequences as tokens no shape gives that away. Who has one mask per sequence puts the axes in on purpose.",
)
class MultiHeadAttention__two_axes_are_batch(_Layer):
    def mask(self, mask):
        return mask[:, None, None] if mask is not None and mask.dim() == 2 else mask


@misconception(
    "MultiHeadAttention",
    "A mask with three axes was taken for (B, T, S). Read from the right, the third axis is the heads: (H, T, S) is a mask per "
    "head.",
)
class MultiHeadAttention__three_axes_are_batch(_Layer):
    def mask(self, mask):
        return mask[:, None] if mask is not None and mask.dim() == 3 else mask


@misconception(
    "MultiHeadAttention",
    "Your queries attend to just those keys that are hidden. That is the convention of nn.MultiheadAttention; here True means "
    "may attend.",
)
class MultiHeadAttention__true_hides(_Layer):
    def mask(self, mask):
        return mask if mask is None else ~mask


@misconception(
    "MultiHeadAttention",
    "The mask was not handed on to the attention.",
)
class MultiHeadAttention__ignores_the_mask(_Layer):
    def attend(self, q, k, v, mask):
        if mask is not None:
            attention(q, k, v, mask)  # says what does not stretch
        return attention(q, k, v)[0]


@misconception(
    "MultiHeadAttention",
    "All heads use the mask of head 0. A mask (H, T, S) is one for each head.",
)
class MultiHeadAttention__mask_of_one_head(_Layer):
    def mask(self, mask):
        return mask[..., :1, :, :] if mask is not None and mask.dim() > 2 and mask.shape[-3] == self.n_heads else mask


@misconception(
    "MultiHeadAttention",
    "A query with nothing allowed became NaN, and NaN spreads into every gradient. Such a head adds zeros.",
)
class MultiHeadAttention__nan_rows(_Layer):
    def attend(self, q, k, v, mask):
        out = attention(q, k, v, mask)[0]
        if mask is None:
            return out
        mask = mask.expand(*q.shape[:3], k.shape[2])
        scores = q @ k.mT * self.d_head**-0.5
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


@misconception(
    "MultiHeadAttention",
    "The context is ignored: the layer always attends to x.",
)
class MultiHeadAttention__ignores_the_context(_Layer):
    def project(self, x, context):
        self.k_proj(context)
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


@misconception(
    "MultiHeadAttention",
    "The keys come from the context, the values from x. A weight says how much of *this* key's value is taken: both come from the "
    "same token.",
)
class MultiHeadAttention__values_of_x(_Layer):
    def project(self, x, context):
        return self.q_proj(x), self.k_proj(context), self.v_proj(x)


@misconception(
    "MultiHeadAttention",
    "Queries come from the context and keys from x. x asks, the context answers: there are as many outputs as tokens in x.",
)
class MultiHeadAttention__context_asks(_Layer):
    def project(self, x, context):
        return self.q_proj(context), self.k_proj(x), self.v_proj(x)


@misconception(
    "MultiHeadAttention",
    "Keys are made by the matrix of the queries. The scores are then symmetric: token A attends to B as B does to A.",
)
class MultiHeadAttention__keys_by_q_proj(_Layer):
    def project(self, x, context):
        same = self.q_proj.weight.shape == self.k_proj.weight.shape
        return self.q_proj(x), (self.q_proj if same else self.k_proj)(context), self.v_proj(context)


@misconception(
    "MultiHeadAttention",
    "Queries and keys were exchanged: token i gets what others think of it.",
)
class MultiHeadAttention__queries_by_k_proj(_Layer):
    def project(self, x, context):
        if self.q_proj.weight.shape != self.k_proj.weight.shape:
            return super().project(x, context)
        return self.k_proj(x), self.q_proj(context), self.v_proj(context)


@misconception(
    "MultiHeadAttention",
    "What the heads found is returned as it is. Without o_proj the heads never mix, and the width is that of the heads.",
)
class MultiHeadAttention__no_output_map(_Layer):
    def output(self, x):
        return x


@misconception(
    "MultiHeadAttention",
    "d_v is ignored: values are as wide as queries here.",
)
class MultiHeadAttention__values_as_wide_as_queries(_Layer):
    def sizes(self, d_model, n_heads, d_head, d_v):
        super().sizes(d_model, n_heads, d_head, d_head)


@misconception(
    "MultiHeadAttention",
    "d_context is ignored: keys and values can only be made from tokens as wide as x.",
)
class MultiHeadAttention__context_as_wide_as_x(_Layer):
    def build(self, d_model, d_context, bias):
        super().build(d_model, d_model, bias)


@misconception(
    "MultiHeadAttention",
    "o_proj has no bias. With bias=True all four projections have one.",
)
class MultiHeadAttention__no_output_bias(_Layer):
    def build(self, d_model, d_context, bias):
        super().build(d_model, d_context, bias)
        self.o_proj = Linear(self.n_heads * self.d_v, d_model, False)


@misconception(
    "MultiHeadAttention",
    "There are biases although nobody asked for them: bias=False is the default, and it holds for all four projections.",
)
class MultiHeadAttention__always_biases(_Layer):
    def build(self, d_model, d_context, bias):
        super().build(d_model, d_context, True)


@misconception(
    "MultiHeadAttention",
    "The numbers are right, but the heads are computed one after the other: the number of matrix products grows with H.",
)
class MultiHeadAttention__head_by_head(_Layer):
    def attend(self, q, k, v, mask):
        attention(q[:, :, :0], k, v, None if mask is None else mask.expand(*q.shape[:3], k.shape[2])[:, :, :0])
        if mask is not None:
            mask = mask.expand(*q.shape[:3], k.shape[2])
        heads = [
            attention(q[:, i], k[:, i], v[:, i], None if mask is None else mask[:, i])[0] for i in range(self.n_heads)
        ]
        return torch.stack(heads, 1)


@misconception(
    "MultiHeadAttention",
    "A context of another batch was stretched over x by broadcasting. One context for all looks like a convenience until it is "
    "the wrong one: compare the batches.",
)
class MultiHeadAttention__any_batch(_Layer):
    def fits(self, x, context):
        pass


@misconception(
    "MultiHeadAttention",
    "Scores of half inputs were computed in half precision: 512 and 514 are one number in bfloat16.",
)
class MultiHeadAttention__scores_in_half(_Layer):
    def attend(self, q, k, v, mask):
        if q.dtype in (torch.float32, torch.float64):
            return super().attend(q, k, v, mask)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


@misconception(
    "MultiHeadAttention",
    "Values and numbers are right, but no gradient reaches queries and keys: something took the weights out of the graph.",
)
class MultiHeadAttention__detached_scores(_Layer):
    def attend(self, q, k, v, mask):
        return super().attend(q.detach(), k.detach(), v, mask)


# from_torch


def _torchs(mha):
    """Copies of torch's weights and biases as q, k, v, o; refuses what the reference refuses."""
    right_from_torch(mha)
    if mha.in_proj_weight is None:
        weights = [mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight, mha.out_proj.weight]
    else:
        weights = [*mha.in_proj_weight.chunk(3), mha.out_proj.weight]
    biases = None if mha.in_proj_bias is None else [*mha.in_proj_bias.chunk(3), mha.out_proj.bias]
    copies = [w.detach().clone() for w in weights]
    return copies, None if biases is None else [b.detach().clone() for b in biases]


def _build(h, weights, biases):
    q, k, v, _ = weights
    module = Right(
        q.shape[1], h, d_head=q.shape[0] // h, d_v=v.shape[0] // h, bias=biases is not None, d_context=k.shape[1]
    ).to(q)
    layers = (module.q_proj, module.k_proj, module.v_proj, module.o_proj)
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.weight.copy_(weights[i])
            if biases is not None:
                layer.bias.copy_(biases[i])
    return module


@misconception(
    "from_torch",
    "The three parts of in_proj were taken in another order than torch stores them: queries first, then keys, then values.",
)
def from_torch__keys_first(mha):
    weights, biases = _torchs(mha)
    if mha.in_proj_weight is not None:
        weights = [weights[1], weights[0], *weights[2:]]
        biases = None if biases is None else [biases[1], biases[0], *biases[2:]]
    return _build(mha.num_heads, weights, biases)


@misconception(
    "from_torch",
    "You read in_proj as if each head had its queries, keys and values next to each other. Some checkpoints do; torch stores "
    "the queries of all heads, then all keys, then all values.",
)
def from_torch__head_by_head(mha):
    weights, biases = _torchs(mha)
    if mha.in_proj_weight is not None:
        mixed = mha.in_proj_weight.detach().unflatten(0, (mha.num_heads, 3, -1)).transpose(0, 1).flatten(1, 2)
        weights = [*mixed, weights[3]]
        if biases is not None:
            mixed = mha.in_proj_bias.detach().unflatten(0, (mha.num_heads, 3, -1)).transpose(0, 1).flatten(1)
            biases = [*mixed, biases[3]]
    return _build(mha.num_heads, weights, biases)


@misconception(
    "from_torch",
    "out_proj was transposed on the way. torch stores (out, in) as you do, and a square matrix does not complain.",
)
def from_torch__transposes_the_output(mha):
    weights, biases = _torchs(mha)
    return _build(mha.num_heads, [*weights[:3], weights[3].T], biases)


@misconception(
    "from_torch",
    "All matrices were transposed on the way. torch stores (out, in) as you do, and square matrices do not complain.",
)
def from_torch__transposes_all(mha):
    weights, biases = _torchs(mha)
    if mha.in_proj_weight is not None:
        weights = [w.T for w in weights]
    return _build(mha.num_heads, weights, biases)


@misconception(
    "from_torch",
    "The biases stayed behind. They are zeros in a new layer of torch, so this shows only once it has been trained.",
)
def from_torch__biases_stay_behind(mha):
    weights, biases = _torchs(mha)
    return _build(mha.num_heads, weights, biases and [torch.zeros_like(b) for b in biases])


@misconception(
    "from_torch",
    "The bias of out_proj stayed behind; it is not part of in_proj_bias.",
)
def from_torch__output_bias_stays_behind(mha):
    weights, biases = _torchs(mha)
    return _build(mha.num_heads, weights, biases and [*biases[:3], torch.zeros_like(biases[3])])


@misconception(
    "from_torch",
    "Your module has biases though torch's layer has none.",
)
def from_torch__always_biases(mha):
    weights, biases = _torchs(mha)
    return _build(mha.num_heads, weights, biases or [w.new_zeros(w.shape[0]) for w in weights])


@misconception(
    "from_torch",
    "A layer of torch with a context of another width has no in_proj_weight: it keeps its three matrices apart.",
)
def from_torch__always_in_proj(mha):
    weights, biases = _torchs(mha)
    return _build(mha.num_heads, [*mha.in_proj_weight.chunk(3), weights[3]], biases)


@misconception(
    "from_torch",
    "The number of heads was lost: the same matrices, read as one wide head, give another function.",
)
def from_torch__one_head(mha):
    weights, biases = _torchs(mha)
    return _build(1, weights, biases)


@misconception(
    "from_torch",
    "Your parameters share memory with torch's: training one module would move the other.",
)
def from_torch__shares_memory(mha):
    module = right_from_torch(mha)
    weights = [mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight]
    if mha.in_proj_weight is not None:
        weights = mha.in_proj_weight.chunk(3)
    layers = (module.q_proj, module.k_proj, module.v_proj, module.o_proj)
    for layer, weight in zip(layers, [*weights, mha.out_proj.weight], strict=True):
        layer.weight = nn.Parameter(weight.detach())
    return module


@misconception(
    "from_torch",
    "The parameters came out as float32. The dtype of torch's layer should stay.",
)
def from_torch__always_float32(mha):
    return right_from_torch(mha).float()


@misconception(
    "from_torch",
    "The parameters cannot be trained any more. They are copies, and copies may have a gradient of their own.",
)
def from_torch__frozen(mha):
    return right_from_torch(mha).requires_grad_(False)


@misconception(
    "from_torch",
    "A layer with add_bias_kv has a key and a value that belong to no token. You dropped them in silence, so the outputs differ.",
)
def from_torch__drops_bias_kv(mha):
    if mha.bias_k is None:
        return right_from_torch(mha)
    plain = copy.deepcopy(mha)
    plain.bias_k = None
    return right_from_torch(plain)


@misconception(
    "from_torch",
    "A layer with add_zero_attn lets every query look at a key of zeros, too. You dropped it in silence, so the outputs differ.",
)
def from_torch__drops_zero_attn(mha):
    plain = copy.deepcopy(mha)
    plain.add_zero_attn = False
    return right_from_torch(plain)


@misconception(
    "from_torch",
    "kdim and vdim differ, and you built a module for one of the two. Its values and keys are made from one context: say that it "
    "cannot be done.",
)
def from_torch__any_widths(mha):
    if mha.kdim == mha.vdim:
        return right_from_torch(mha)
    weights = [mha.q_proj_weight, mha.k_proj_weight, mha.k_proj_weight, mha.out_proj.weight]
    return _build(mha.num_heads, [w.detach() for w in weights], None)


# head_contributions


def _found(module, x, mask=None):
    """What each head found, before the output map, (B, H, T, Dv)."""
    q, k, v = (split_heads(layer(x), module.n_heads) for layer in (module.q_proj, module.k_proj, module.v_proj))
    return attention(q, k, v, mask)[0]


def _maps(module):
    return module.o_proj.weight.unflatten(1, (module.n_heads, -1)).transpose(0, 1)


@misconception(
    "head_contributions",
    "Every head brings the bias of o_proj along, so the sum has it H times. It belongs to no head.",
)
def head_contributions__bias_in_each(module, x, mask=None):
    out = right_contributions(module, x, mask)
    return out if module.o_proj.bias is None else out + module.o_proj.bias


@misconception(
    "head_contributions",
    "The bias of o_proj was shared out among the heads. It is added once, after the sum, and belongs to no head.",
)
def head_contributions__bias_shared(module, x, mask=None):
    out = right_contributions(module, x, mask)
    return out if module.o_proj.bias is None else out + module.o_proj.bias / module.n_heads


@misconception(
    "head_contributions",
    "These are the mixtures of the heads before the output map, Dv wide. What a head adds to the output is D wide: its mixture "
    "has to go through its part of o_proj.",
)
def head_contributions__before_the_output_map(module, x, mask=None):
    return _found(module, x, mask)


@misconception(
    "head_contributions",
    "You took rows of o_proj.weight for the heads. Rows are outputs; what a head feeds are columns.",
)
def head_contributions__rows(module, x, mask=None):
    weight = module.o_proj.weight
    if weight.shape[0] != weight.shape[1]:
        return right_contributions(module, x, mask)
    return _found(module, x, mask) @ weight.unflatten(0, (module.n_heads, -1))


@misconception(
    "head_contributions",
    "Your heads own every H-th column of o_proj. The columns of a head stand together, as its rows do in v_proj.",
)
def head_contributions__strided_columns(module, x, mask=None):
    maps = module.o_proj.weight.unflatten(1, (-1, module.n_heads)).permute(2, 0, 1)
    return _found(module, x, mask) @ maps.mT


@misconception(
    "head_contributions",
    "The contributions were divided by H. The heads are added, not averaged: the sum should be the output.",
)
def head_contributions__averaged(module, x, mask=None):
    return right_contributions(module, x, mask) / module.n_heads


@misconception(
    "head_contributions",
    "The mask is not used here, though the output obeys it.",
)
def head_contributions__ignores_the_mask(module, x, mask=None):
    return right_contributions(module, x)


@misconception(
    "head_contributions",
    "Heads and tokens stand in the wrong order: (B, H, T, D) was asked for.",
)
def head_contributions__tokens_first(module, x, mask=None):
    return right_contributions(module, x, mask).transpose(1, 2)


@misconception(
    "head_contributions",
    "The heads have no axis of their own any more: this is their sum.",
)
def head_contributions__summed(module, x, mask=None):
    return right_contributions(module, x, mask).sum(1, keepdim=True)


@misconception(
    "head_contributions",
    "The numbers are right, but the whole output map was applied once per head, to mixtures that are mostly zeros. That costs H "
    "times the FLOPs of o_proj: give each head its own columns only.",
)
def head_contributions__zeros_elsewhere(module, x, mask=None):
    found = _found(module, x, mask)
    eye = torch.eye(module.n_heads, dtype=found.dtype, device=x.device)[:, None, :, None]  # (H, 1, H, 1)
    alone = found.transpose(1, 2)[:, None] * eye  # (B, H, T, H, Dv)
    return alone.flatten(-2) @ module.o_proj.weight.T


@misconception(
    "head_contributions",
    "The contributions are not part of a graph. Who asks which head matters asks for their gradients next.",
)
def head_contributions__no_graph(module, x, mask=None):
    with torch.no_grad():
        return right_contributions(module, x, mask)


@misconception(
    "head_contributions",
    "The biases of the values are missing. Each head carries its own through its columns of o_proj.",
)
def head_contributions__no_value_bias(module, x, mask=None):
    if module.v_proj.bias is None:
        return right_contributions(module, x, mask)
    bias = module.v_proj.bias.unflatten(0, (module.n_heads, 1, -1))  # (H, 1, Dv)
    seen = 1.0 if mask is None else mask.expand(len(x), module.n_heads, x.shape[1], x.shape[1]).any(-1, True).to(x)
    return (_found(module, x, mask) - bias * seen) @ _maps(module).mT


# prune_heads


def _rows(layer, h, keep):
    bias = None if layer.bias is None else layer.bias.unflatten(0, (h, -1))[keep].flatten()
    return layer.weight.unflatten(0, (h, -1))[keep].flatten(0, 1), bias


@torch.no_grad()
def _pruned(module, keep, *, output=None, output_bias=None):
    right_prune_heads(module, keep)
    keep, h = list(keep), module.n_heads
    parts = [_rows(layer, h, keep) for layer in (module.q_proj, module.k_proj, module.v_proj)]
    output = module.o_proj.weight.unflatten(1, (h, -1))[:, keep].flatten(1) if output is None else output
    biases = None
    if module.o_proj.bias is not None:
        biases = [b for _, b in parts] + [module.o_proj.bias if output_bias is None else output_bias]
    return _build(len(keep), [w for w, _ in parts] + [output], biases)


@misconception(
    "prune_heads",
    "The heads named in keep are those that went. They are the ones to stay.",
)
def prune_heads__drops_them(module, keep):
    right_prune_heads(module, keep)
    rest = [head for head in range(module.n_heads) if head not in keep]
    return right_prune_heads(module, rest or keep)


@misconception(
    "prune_heads",
    "Your heads come out in the order of their numbers. keep is a list, and its order is the order of the new heads.",
)
def prune_heads__sorted(module, keep):
    return right_prune_heads(module, sorted(keep)) if len(set(keep)) == len(keep) else right_prune_heads(module, keep)


@misconception(
    "prune_heads",
    "keep was taken for a list of features: one row is left for each head. Head h owns a block of rows.",
)
@torch.no_grad()
def prune_heads__features(module, keep):
    right_prune_heads(module, keep)
    keep = list(keep)
    weights = [layer.weight[keep] for layer in (module.q_proj, module.k_proj, module.v_proj)]
    biases = None
    if module.o_proj.bias is not None:
        biases = [layer.bias[keep] for layer in (module.q_proj, module.k_proj, module.v_proj)] + [module.o_proj.bias]
    return _build(len(keep), [*weights, module.o_proj.weight[:, keep]], biases)


@misconception(
    "prune_heads",
    "The first columns of o_proj were kept whatever keep says: the heads that are left go out through the doors of others.",
)
def prune_heads__first_columns(module, keep):
    return _pruned(module, keep, output=module.o_proj.weight[:, : len(keep) * module.d_v])


@misconception(
    "prune_heads",
    "The outputs were scaled up by H / len(keep), as dropout does. The heads that are left do what they did before.",
)
def prune_heads__rescales(module, keep):
    right_prune_heads(module, keep)
    columns = module.o_proj.weight.unflatten(1, (module.n_heads, -1))[:, list(keep)].flatten(1)
    return _pruned(module, keep, output=columns * (module.n_heads / len(keep)))


@misconception(
    "prune_heads",
    "The bias of o_proj went with the heads. It belonged to none of them, and is as large as before.",
)
def prune_heads__drops_the_output_bias(module, keep):
    zeros = None if module.o_proj.bias is None else torch.zeros_like(module.o_proj.bias)
    return _pruned(module, keep, output_bias=zeros)


@misconception(
    "prune_heads",
    "The bias of o_proj was reduced with the number of heads. It belongs to none of them, and is as large as before.",
)
def prune_heads__shares_the_output_bias(module, keep):
    bias = module.o_proj.bias
    return _pruned(module, keep, output_bias=None if bias is None else bias * len(keep) / module.n_heads)


@misconception(
    "prune_heads",
    "The biases of queries, keys and values stayed behind.",
)
@torch.no_grad()
def prune_heads__biases_stay_behind(module, keep):
    pruned = right_prune_heads(module, keep)
    for layer in (pruned.q_proj, pruned.k_proj, pruned.v_proj):
        if layer.bias is not None:
            layer.bias.zero_()
    return pruned


@misconception(
    "prune_heads",
    "The outputs are right, but the module has kept its size: columns of zeros still cost memory and time.",
)
@torch.no_grad()
def prune_heads__zeros(module, keep):
    right_prune_heads(module, keep)
    pruned = copy.deepcopy(module)
    pruned.o_proj.weight.unflatten(1, (module.n_heads, -1))[:, [h for h in range(module.n_heads) if h not in keep]] = 0
    return pruned


@misconception(
    "prune_heads",
    "The module that was given has been cut itself. Return a new one; the old one may be needed to compare with.",
)
def prune_heads__in_place(module, keep):
    pruned = right_prune_heads(module, keep)
    module.__dict__.update(pruned.__dict__)
    return module


@misconception(
    "prune_heads",
    "Your parameters share memory with those of the module that was given: slices are views, and training one would move the "
    "other.",
)
def prune_heads__views(module, keep):
    pruned = right_prune_heads(module, keep)
    first, last = min(keep), max(keep) + 1
    if list(keep) == list(range(first, last)):
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = getattr(module, name).weight.detach().unflatten(0, (module.n_heads, -1))[first:last].flatten(0, 1)
            getattr(pruned, name).weight = nn.Parameter(rows)
    return pruned


@misconception(
    "prune_heads",
    "A head that is named twice was taken twice, so it speaks twice as loud. Refuse that.",
)
def prune_heads__twice(module, keep):
    if not keep or not all(0 <= head < module.n_heads for head in keep):
        raise ValueError(f"{list(keep)}")
    return _twice(module, keep)


@torch.no_grad()
def _twice(module, keep):
    keep, h = list(keep), module.n_heads
    parts = [_rows(layer, h, keep) for layer in (module.q_proj, module.k_proj, module.v_proj)]
    output = module.o_proj.weight.unflatten(1, (h, -1))[:, keep].flatten(1)
    biases = None if module.o_proj.bias is None else [b for _, b in parts] + [module.o_proj.bias]
    return _build(len(keep), [w for w, _ in parts] + [output], biases)


@misconception(
    "prune_heads",
    "-1 was taken as the last head, as an index would be. Heads have numbers from 0, and a negative one is a mistake somewhere.",
)
def prune_heads__from_the_end(module, keep):
    wrapped = [head + module.n_heads if -module.n_heads <= head < 0 else head for head in keep]
    if wrapped != list(keep):
        return right_prune_heads(module, wrapped)
    return right_prune_heads(module, keep)


@misconception(
    "prune_heads",
    "The width of a head was computed anew from d_model and the number of heads that are left. Heads keep the width that they "
    "have.",
)
def prune_heads__new_widths(module, keep):
    pruned = right_prune_heads(module, keep)
    pruned.d_head = pruned.d_v = pruned.o_proj.weight.shape[0] // len(keep)
    return pruned


@misconception(
    "prune_heads",
    "The parameters came out as float32. The dtype of the module should stay.",
)
def prune_heads__always_float32(module, keep):
    return right_prune_heads(module, keep).float()


# stack_heads


def _change(module, name, value):
    with torch.no_grad():
        owner, key = name.split(".")
        getattr(getattr(module, owner), key).copy_(value)
    return module


@misconception(
    "stack_heads",
    "Your module averages the heads: its numbers are too small by their number. It was to be their sum.",
)
def stack_heads__averages(heads):
    module = right_stack_heads(heads)
    _change(module, "o_proj.weight", module.o_proj.weight / len(heads))
    return module if module.o_proj.bias is None else _change(module, "o_proj.bias", module.o_proj.bias / len(heads))


@misconception(
    "stack_heads",
    "Only one head's output bias was taken. Each head adds its own, so the sum has all of them.",
)
def stack_heads__one_output_bias(heads):
    module = right_stack_heads(heads)
    return module if module.o_proj.bias is None else _change(module, "o_proj.bias", heads[0].o_proj.bias)


@misconception(
    "stack_heads",
    "The output biases were averaged. Each head adds its own, so the sum has all of them.",
)
def stack_heads__average_output_bias(heads):
    module = right_stack_heads(heads)
    if module.o_proj.bias is None:
        return module
    return _change(module, "o_proj.bias", module.o_proj.bias / len(heads))


@misconception(
    "stack_heads",
    "The biases stayed behind.",
)
@torch.no_grad()
def stack_heads__biases_stay_behind(heads):
    module = right_stack_heads(heads)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    return module


@misconception(
    "stack_heads",
    "All heads go out through the output map of the first one.",
)
def stack_heads__first_output_map(heads):
    module = right_stack_heads(heads)
    return _change(module, "o_proj.weight", torch.cat([heads[0].o_proj.weight] * len(heads), 1))


@misconception(
    "stack_heads",
    "The heads come out in another order. Head h of the result is the one that stood at place h.",
)
def stack_heads__backwards(heads):
    return right_stack_heads(heads[::-1])


@misconception(
    "stack_heads",
    "The rows of the heads are interleaved: feature 0 of all heads, then feature 1. In a module the rows of a head stand together.",
)
@torch.no_grad()
def stack_heads__interleaved(heads):
    module = right_stack_heads(heads)
    for layer in (module.q_proj, module.k_proj, module.v_proj):
        layer.weight.copy_(layer.weight.unflatten(0, (len(heads), -1)).transpose(0, 1).flatten(0, 1))
        if layer.bias is not None:
            layer.bias.copy_(layer.bias.unflatten(0, (len(heads), -1)).T.flatten())
    return module


@misconception(
    "stack_heads",
    "The same head stands at every place.",
)
def stack_heads__the_same_head(heads):
    right_stack_heads(heads)
    return right_stack_heads([heads[0]] * len(heads))


@misconception(
    "stack_heads",
    "The output maps were joined by rows, or transposed. A head feeds columns, so they stand side by side.",
)
def stack_heads__output_rows(heads):
    module = right_stack_heads(heads)
    weight = torch.cat([head.o_proj.weight.T for head in heads], 0)
    return _change(module, "o_proj.weight", weight.reshape(module.o_proj.weight.shape))


@misconception(
    "stack_heads",
    "Some heads have biases, some have not, and you dropped or invented some in silence. Refuse to stack them.",
)
def stack_heads__mixed_biases(heads):
    if len({head.q_proj.bias is None for head in heads}) < 2:
        return right_stack_heads(heads)
    return right_stack_heads([head for head in heads if head.q_proj.bias is None])


@misconception(
    "stack_heads",
    "Only the first two heads were compared, or neighbors that happen to agree. Every head has to fit the first one.",
)
def stack_heads__compares_the_first_two(heads):
    if len(heads) < 3:
        return right_stack_heads(heads)
    right_stack_heads(heads[:2])
    fits = [head for head in heads if head.q_proj.weight.shape == heads[0].q_proj.weight.shape]
    return right_stack_heads(fits)


@misconception(
    "stack_heads",
    "Heads whose outputs are not as wide as the model got through. A module maps D to D.",
)
def stack_heads__any_output_width(heads):
    if heads and heads[0].o_proj.weight.shape[0] != heads[0].q_proj.weight.shape[1]:
        return heads[0]
    return right_stack_heads(heads)


@misconception(
    "stack_heads",
    "An empty list ended in an error of Python's own. Say what is missing.",
)
def stack_heads__nothing(heads):
    heads[0]
    return right_stack_heads(heads)


@misconception(
    "stack_heads",
    "Your parameters share memory with those of the heads: with a single head, joining it to nothing made no copy.",
)
def stack_heads__no_copy(heads):
    module = right_stack_heads(heads)
    if len(heads) == 1:
        module.q_proj.weight = nn.Parameter(heads[0].q_proj.weight.detach())
    return module


@misconception(
    "stack_heads",
    "The parameters came out as float32. The dtype of the heads should stay.",
)
def stack_heads__always_float32(heads):
    return right_stack_heads(heads).float()


# canonicalize


def _canonical(module, *, queries=True, values=True, order=True):
    """The right form, with some of its three freedoms left as they were."""
    right = right_canonicalize(module)
    found = Right(
        module.q_proj.weight.shape[1],
        module.n_heads,
        d_head=module.d_head,
        d_v=module.d_v,
        bias=module.o_proj.bias is not None,
        d_context=module.k_proj.weight.shape[1],
    ).to(module.q_proj.weight)
    h = module.n_heads

    def strength(m):
        q, k = (
            torch.cat([x.weight, x.weight[:, :0] if x.bias is None else x.bias[:, None]], 1).unflatten(0, (h, -1))
            for x in (m.q_proj, m.k_proj)
        )
        return torch.linalg.matrix_norm(q.mT @ k)

    places = strength(right).argsort()[strength(module).argsort().argsort()]  # where each head has gone
    moved = right_prune_heads(right, places.tolist())  # the right form, heads as they were
    source = moved.state_dict()
    for name, value in module.state_dict().items():
        if name == "o_proj.bias" or name[0] in ("q", "k") and not queries or name[0] in ("v", "o") and not values:
            source[name] = value
    found.load_state_dict(source)
    return right_prune_heads(found, strength(module).argsort().tolist()) if order else found


@misconception(
    "canonicalize",
    "The module came back as it was. Two modules that compute the same still have different numbers.",
)
def canonicalize__a_copy(module):
    right_canonicalize(module)
    return copy.deepcopy(module).requires_grad_()


@misconception(
    "canonicalize",
    "Queries and keys are settled, values and outputs are not: the same freedom lies between W_V and W_O.",
)
def canonicalize__queries_alone(module):
    return _canonical(module, values=False)


@misconception(
    "canonicalize",
    "Values and outputs are settled, queries and keys are not: only W_Q^T W_K can be seen from outside.",
)
def canonicalize__values_alone(module):
    return _canonical(module, queries=False)


@misconception(
    "canonicalize",
    "Each head is settled, their order is not. Find a number that a head keeps whatever its basis is, and sort by it.",
)
def canonicalize__any_order(module):
    return _canonical(module, order=False)


@misconception(
    "canonicalize",
    "The weights are settled, the biases were left in the old basis: scores with a bias in them have changed.",
)
@torch.no_grad()
def canonicalize__biases_as_they_were(module):
    if module.q_proj.bias is None:
        return right_canonicalize(module)
    found = right_canonicalize(module)
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(found, name).bias.copy_(getattr(module, name).bias)
    return found


@misconception(
    "canonicalize",
    "The heads were sorted by the size of a weight matrix. A change of basis changes that size, and with it the order.",
)
def canonicalize__sorted_by_weights(module):
    found = _canonical(module, order=False)
    sizes = module.q_proj.weight.detach().unflatten(0, (module.n_heads, -1)).flatten(1).norm(dim=1)
    return right_prune_heads(found, sizes.argsort().tolist())


@misconception(
    "canonicalize",
    "Each row was brought to length 1, with the length moved to its partner. Only scales are settled then: a basis can also be "
    "turned.",
)
@torch.no_grad()
def canonicalize__scales_alone(module):
    right_canonicalize(module)
    found = copy.deepcopy(_canonical(module, queries=False, values=False))
    h = module.n_heads
    for left, right in ((found.q_proj, found.k_proj), (found.v_proj, None)):
        length = left.weight.norm(dim=1, keepdim=True)
        left.weight.div_(length)
        if left.bias is not None:
            left.bias.div_(length[:, 0])
        if right is None:
            found.o_proj.weight.mul_(length[:, 0])
        else:
            right.weight.mul_(length)
            if right.bias is not None:
                right.bias.mul_(length[:, 0])
    return right_prune_heads(found, range(h))


@misconception(
    "canonicalize",
    "Your module has the largest possible heads, whatever came in. Where Dh exceeds D, W_Q^T W_K has no rank left to tell the "
    "basis by: say so.",
)
def canonicalize__any_width(module):
    if max(module.d_head, module.d_v) <= min(module.q_proj.weight.shape[1], module.k_proj.weight.shape[1]):
        return right_canonicalize(module)
    return copy.deepcopy(module)


@misconception(
    "canonicalize",
    "The module that was given was changed, or handed back: its own parameters are in the result.",
)
def canonicalize__in_place(module):
    found = right_canonicalize(module)
    with torch.no_grad():
        for ours, theirs in zip(module.parameters(), found.parameters(), strict=True):
            ours.copy_(theirs)
    return module
