"""Day 17: known wrong solutions, each with the sentence for whoever wrote it."""

import torch
from torch import nn

from checker.testing import misconception
from reference import day17_self_attention as right
from reference.day16_scaled_dot_product import attention, causal_mask, combine_masks


@misconception(
    "segment_mask",
    "All places of a row see each other: packed documents read each other's text. Compare the numbers of the two places.",
)
def segment_mask__no_segments(segments):
    B, T = segments.shape
    return torch.ones(B, 1, T, T, dtype=torch.bool, device=segments.device)


@misconception(
    "segment_mask",
    "Your mask is True where the documents differ. True means may attend, so it belongs where they are the same.",
)
def segment_mask__where_they_differ(segments):
    return ~right.segment_mask(segments)


@misconception(
    "segment_mask",
    "Earlier documents are visible, too: the numbers are compared by order. A later document may not read an earlier one.",
)
def segment_mask__ordered(segments):
    return (segments[:, :, None] >= segments[:, None, :])[:, None]


@misconception(
    "segment_mask",
    "Causality slipped in: places see only earlier ones of their document. Here both directions are allowed.",
)
def segment_mask__causal(segments):
    return right.segment_mask(segments).tril()


@misconception(
    "padding_mask",
    "One key too many: with a length of n the keys are 0 to n - 1, and your mask still allows key n.",
)
def padding_mask__one_more(lengths, tq):
    T = int(lengths.max()) if len(lengths) else 0
    valid = torch.arange(T, device=lengths.device) <= lengths[:, None]
    return valid[:, None, None, :].expand(len(lengths), 1, tq, T)


@misconception(
    "padding_mask",
    "True stands on the padding. That is torch's key_padding_mask of nn.MultiheadAttention; here True means may attend.",
)
def padding_mask__true_is_padding(lengths, tq):
    return ~right.padding_mask(lengths, tq)


@misconception(
    "padding_mask",
    "The number of keys was taken from the number of queries. How many keys there are is told by the longest row.",
)
def padding_mask__as_many_keys_as_queries(lengths, tq):
    valid = torch.arange(tq, device=lengths.device) < lengths[:, None]
    return valid[:, None, None, :].expand(len(lengths), 1, tq, tq)


@misconception(
    "padding_mask",
    "Your mask hides queries, not keys. Keys are the last axis; with as many queries as keys no shape gives this away.",
)
def padding_mask__hides_queries(lengths, tq):
    T = int(lengths.max()) if len(lengths) else 0
    valid = torch.arange(tq, device=lengths.device) < lengths[:, None]
    return valid[:, None, :, None].expand(len(lengths), 1, tq, T)


class _Wrong(right.SelfAttention):
    def qkv(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def masks(self, x, mask, causal):
        if mask is not None and mask.dim() == 4:
            mask = mask[:, 0]
        return combine_masks(mask, causal_mask(x.shape[1], x.shape[1], device=x.device)) if causal else mask

    def forward(self, x, mask=None, *, causal=False):
        return self.o_proj(attention(*self.qkv(x), self.masks(x, mask, causal))[0])


@misconception(
    "SelfAttention",
    "Your scale is that of the model's width. The dot products run over the width of the head, and the scale follows it.",
)
class SelfAttention__scale_of_the_model(_Wrong):
    def forward(self, x, mask=None, *, causal=False):
        return self.o_proj(attention(*self.qkv(x), self.masks(x, mask, causal), x.shape[-1] ** -0.5)[0])


@misconception(
    "SelfAttention",
    "Queries and keys come from one projection. That makes the scores symmetric: what A gives to B, B would give to A.",
)
class SelfAttention__one_projection_for_two(_Wrong):
    def qkv(self, x):
        q = self.q_proj(x)
        self.k_proj(x)
        return q, q, self.v_proj(x)


@misconception(
    "SelfAttention",
    "Queries and keys have changed places: your scores are the transpose of the right ones.",
)
class SelfAttention__queries_and_keys_exchanged(_Wrong):
    def qkv(self, x):
        q, k, v = super().qkv(x)
        return k, q, v


@misconception(
    "SelfAttention",
    "The keys are mixed instead of the values. What is looked up by and what is handed out are two projections.",
)
class SelfAttention__keys_as_values(_Wrong):
    def qkv(self, x):
        q, k, v = super().qkv(x)
        return q, k, k


@misconception(
    "SelfAttention",
    "The output projection is missing: the head writes in its own coordinates, and only as wide as it is itself.",
)
class SelfAttention__no_output_projection(_Wrong):
    def forward(self, x, mask=None, *, causal=False):
        return attention(*self.qkv(x), self.masks(x, mask, causal))[0]


@misconception(
    "SelfAttention",
    "No place sees itself in your causal mask, and the first one sees nothing. A place may look at itself.",
)
class SelfAttention__not_itself(_Wrong):
    def masks(self, x, mask, causal):
        T = x.shape[1]
        own = causal_mask(T, T, offset=-1, device=x.device) if causal else None
        return combine_masks(super().masks(x, mask, False), own)


@misconception(
    "SelfAttention",
    "Your causal mask is turned around: places see the future and not the past.",
)
class SelfAttention__sees_the_future(_Wrong):
    def masks(self, x, mask, causal):
        T = x.shape[1]
        own = causal_mask(T, T, device=x.device).mT if causal else None
        return combine_masks(super().masks(x, mask, False), own)


@misconception(
    "SelfAttention",
    "causal=True had no effect: the numbers are those of a layer in which everybody sees everything.",
)
class SelfAttention__never_causal(_Wrong):
    def masks(self, x, mask, causal):
        return super().masks(x, mask, False)


@misconception(
    "SelfAttention",
    "With causal=True the given mask is forgotten. Both have to hold: a key is seen if neither hides it.",
)
class SelfAttention__causal_replaces_the_mask(_Wrong):
    def masks(self, x, mask, causal):
        return super().masks(x, None if causal else mask, causal)


@misconception(
    "SelfAttention",
    "The mean over time is taken away inside the layer. That mean contains the future, so even the first place knows the last.",
)
class SelfAttention__normalized_over_time(_Wrong):
    def qkv(self, x):
        return super().qkv(x - x.mean(1, keepdim=True))


@misconception(
    "SelfAttention",
    "The input is added to the output when the widths allow it. The residual belongs to the block around the layer.",
)
class SelfAttention__residual(_Wrong):
    def forward(self, x, mask=None, *, causal=False):
        out = super().forward(x, mask, causal=causal)
        return out + x if out.shape == x.shape else out


class _WrongCross(right.CrossAttention):
    def mask(self, context_mask):
        return None if context_mask is None else context_mask[:, None, :]

    def forward(self, x, context, context_mask=None):
        if len(x) != len(context):
            raise ValueError(f"{tuple(x.shape)} {tuple(context.shape)}")
        if context_mask is not None and context_mask.shape != context.shape[:2]:
            raise ValueError(f"{tuple(context_mask.shape)} {tuple(context.shape)}")
        q, k, v = self.q_proj(x), self.k_proj(context), self.v_proj(context)
        return self.o_proj(attention(q, k, v, self.mask(context_mask))[0])


@misconception(
    "CrossAttention",
    "The mask (B, S) went in as it is and was read as (T, S). With other sizes that is an error, with B equal to T it is "
    "silent, and each query gets the mask of another row.",
)
class CrossAttention__mask_as_it_is(_WrongCross):
    def mask(self, context_mask):
        return context_mask


@misconception(
    "CrossAttention",
    "Your mask lies along the queries: keys are the last axis. With as many queries as keys the shapes cannot tell.",
)
class CrossAttention__mask_on_the_queries(_WrongCross):
    def mask(self, context_mask):
        return None if context_mask is None else context_mask[:, :, None]


@misconception(
    "CrossAttention",
    "The mask has no effect: what is hidden in the context is read all the same.",
)
class CrossAttention__no_mask(_WrongCross):
    def mask(self, context_mask):
        return None


@misconception(
    "CrossAttention",
    "Your mask works the wrong way round: it hides what may be read. True means may attend.",
)
class CrossAttention__mask_inverted(_WrongCross):
    def mask(self, context_mask):
        return None if context_mask is None else ~context_mask[:, None, :]


@misconception(
    "CrossAttention",
    "Hidden context was set to zero instead of being masked. Zeros still have a score of 0 and a weight of exp(0).",
)
class CrossAttention__zeros_for_hidden(_WrongCross):
    def forward(self, x, context, context_mask=None):
        if context_mask is not None and context_mask.shape == context.shape[:2]:
            context = context * context_mask[..., None]
            context_mask = torch.ones_like(context_mask)
        return super().forward(x, context, context_mask)


@misconception(
    "future_leak",
    "The outputs were added up before the gradient was taken. Leaks of opposite signs cancel, and equal ones add up; each "
    "derivative counts by itself.",
)
def future_leak__summed(module, x, t):
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(module(x)[:, : t + 1].sum(), x)
    future = grad[:, t + 1 :]
    return future.abs().max().item() if future.numel() else 0.0


def _leak(module, x, t, outputs, inputs, size=torch.abs):
    x, leak = x.detach().requires_grad_(), 0.0
    with torch.enable_grad():
        for o in module(x)[:, outputs].flatten():
            part = torch.autograd.grad(o, x, retain_graph=True)[0][:, inputs]
            leak = max(leak, size(part).max().item() if part.numel() else 0.0)
    return leak


@misconception(
    "future_leak",
    "The input at place t counts as future here. A place may see itself; the future begins at t + 1.",
)
def future_leak__itself_is_future(module, x, t):
    return _leak(module, x, t, slice(0, t + 1), slice(t, None))


@misconception(
    "future_leak",
    "The output at place t is not looked at: [:t] ends before it. A mask that is off by one leaks just there.",
)
def future_leak__without_the_last_output(module, x, t):
    return _leak(module, x, t, slice(0, t), slice(t + 1, None))


@misconception(
    "future_leak",
    "You measure how the past acts on the future. That is what attention is for; a leak goes the other way.",
)
def future_leak__the_other_way(module, x, t):
    return _leak(module, x, t, slice(t + 1, None), slice(0, t + 1))


@misconception(
    "future_leak",
    "Negative derivatives are passed over. A leak of -0.25 is as bad as one of 0.25: take magnitudes before the maximum.",
)
def future_leak__signed(module, x, t):
    return _leak(module, x, t, slice(0, t + 1), slice(t + 1, None), size=lambda part: part)


@misconception(
    "future_leak",
    "Your check runs the module twice with the same input, and what does not change cannot show a leak. It is the future "
    "that has to be varied while the past is watched.",
)
def future_leak__same_input_twice(module, x, t):
    return (module(x)[:, : t + 1] - module(x)[:, : t + 1]).abs().max().item()


def _valid(x, lengths):
    if lengths.shape != x.shape[:1]:
        raise ValueError(f"{tuple(lengths.shape)} {tuple(x.shape)}")
    return torch.arange(x.shape[1], device=x.device) < lengths[:, None]


@misconception(
    "masked_self_attention",
    "Padding was set to zero and left visible. Zero vectors still get a weight of exp(0), so the more padding, the less is "
    "left for the real places.",
)
def masked_self_attention__zeros(module, x, lengths, *, causal):
    valid = _valid(x, lengths)[..., None]
    return module(x.masked_fill(~valid, 0.0), causal=causal).masked_fill(~valid, 0.0)


@misconception(
    "masked_self_attention",
    "The keys are masked, but the outputs of the padding are left as they came. They have to be zeros.",
)
def masked_self_attention__outputs_left(module, x, lengths, *, causal):
    valid = _valid(x, lengths)
    return module(x.masked_fill(~valid[..., None], 0.0), valid[:, None, None, :], causal=causal)


@misconception(
    "masked_self_attention",
    "A weight of 0 is not enough when the padding holds NaN or infinity: 0 times NaN is NaN. Clean the padding before the "
    "layer reads it.",
)
def masked_self_attention__nan_survives(module, x, lengths, *, causal):
    valid = _valid(x, lengths)
    return module(x, valid[:, None, None, :], causal=causal).masked_fill(~valid[..., None], 0.0)


@misconception(
    "masked_self_attention",
    "Your mask has as many keys as the longest row, and x has T places. Where T is larger the two do not fit, and a mask of "
    "a single key is even stretched over all places, with no error to tell.",
)
def masked_self_attention__keys_of_the_longest_row(module, x, lengths, *, causal):
    valid = _valid(x, lengths)[..., None]
    mask = right.padding_mask(lengths, x.shape[1])
    return module(x.masked_fill(~valid, 0.0), mask, causal=causal).masked_fill(~valid, 0.0)


@misconception(
    "masked_self_attention",
    "causal is not passed on: the valid places of your rows see their future whatever was asked for.",
)
def masked_self_attention__never_causal(module, x, lengths, *, causal):
    return right.masked_self_attention(module, x, lengths, causal=False)


@misconception(
    "window_mask",
    "Your window is one place too wide. A window of 1 is the place itself, and nothing before it.",
)
def window_mask__one_wider(tq, tk, window, *, offset=None, device=None):
    return right.window_mask(tq, tk, window + 1, offset=offset, device=device)


@misconception(
    "window_mask",
    "Your window reaches into the future as well. It ends at the place of the query.",
)
def window_mask__both_sides(tq, tk, window, *, offset=None, device=None):
    o = tk - tq if offset is None else offset
    age = torch.arange(tq, device=device)[:, None] + o - torch.arange(tk, device=device)
    return age.abs() < window


@misconception(
    "window_mask",
    "The default offset is not 0: the last query belongs to the last key, or one new query with a cache looks at the oldest.",
)
def window_mask__top_left(tq, tk, window, *, offset=None, device=None):
    return right.window_mask(tq, tk, window, offset=0 if offset is None else offset, device=device)


@misconception(
    "window_mask",
    "An offset of 0 was taken for None. Ask whether it is None, not whether it is true.",
)
def window_mask__zero_is_none(tq, tk, window, *, offset=None, device=None):
    return right.window_mask(tq, tk, window, offset=offset or None, device=device)


@misconception(
    "prefix_mask",
    "The prefix is visible only to itself or only causally: your mask requires both reasons, and one is enough.",
)
def prefix_mask__both(t, prefix, *, device=None):
    return causal_mask(t, t, device=device) & (torch.arange(t, device=device) < prefix)


@misconception(
    "prefix_mask",
    "It is the places of the prefix that see everything in your mask. They should be seen by everybody.",
)
def prefix_mask__rows(t, prefix, *, device=None):
    return causal_mask(t, t, device=device) | (torch.arange(t, device=device) < prefix)[:, None]


@misconception(
    "fuse_qkv",
    "Your order is not q, k, v. The shapes do not tell, but whoever cuts the result into three takes one for another.",
)
def fuse_qkv__another_order(state):
    names = {"q_proj": "k_proj", "k_proj": "q_proj"}
    return right.fuse_qkv({n.replace(n[:6], names.get(n[:6], n[:6])): p for n, p in state.items()})


@misconception(
    "fuse_qkv",
    "The biases were left behind: the weights are fused, and the fused layer gives other numbers.",
)
def fuse_qkv__no_bias(state):
    fused = right.fuse_qkv(state)
    fused.pop("qkv_proj.bias", None)
    return fused


@misconception(
    "split_qkv",
    "Rows were dealt out in turns, as if q, k and v alternated. The first third belongs to q, the second to k.",
)
def split_qkv__alternating(state):
    split = right.split_qkv(state)
    for kind in ("weight", "bias"):
        if f"qkv_proj.{kind}" in state:
            for i, n in enumerate("qkv"):
                split[f"{n}_proj.{kind}"] = state[f"qkv_proj.{kind}"][i::3].clone()
    return split


@misconception(
    "split_qkv",
    "The three parts are views of one matrix: a change of one place in memory would be seen through both states.",
)
def split_qkv__views(state):
    split = right.split_qkv(state)
    for kind in ("weight", "bias"):
        if f"qkv_proj.{kind}" in state:
            for n, part in zip("qkv", state[f"qkv_proj.{kind}"].chunk(3), strict=True):
                split[f"{n}_proj.{kind}"] = part
    return split


def _f(x):
    return nn.functional.elu(x) + 1


@misconception(
    "parallel",
    "The weights are not divided by their sum, so your rows grow with the number of places. It should be a mean.",
)
def parallel__no_sum(q, k, v):
    return (_f(q) @ _f(k).mT).tril() @ v


@misconception(
    "parallel",
    "Each place reads the future: the table of weights has no causal triangle.",
)
def parallel__not_causal(q, k, v):
    weights = _f(q) @ _f(k).mT
    return weights @ v / weights.sum(-1, keepdim=True)


@misconception(
    "parallel",
    "There is a softmax in it. Linear attention has none: the weights are the dot products of the features.",
)
def parallel__softmax(q, k, v):
    T = q.shape[-2]
    return attention(q, k, v, causal_mask(T, T, device=q.device))[0]


@misconception(
    "recurrent",
    "You read the memory before you write to it, so a place does not see itself, and the first one divides zero by zero.",
)
def recurrent__reads_first(q, k, v):
    q, k = _f(q), _f(k)
    state, total = v.new_zeros(*k.shape[:-2], k.shape[-1], v.shape[-1]), torch.zeros_like(q[..., 0:1, :].sum(-2))
    out = []
    for t in range(q.shape[-2]):
        query = q[..., t, :]
        out.append((query[..., None, :] @ state)[..., 0, :] / (query * total).sum(-1, keepdim=True))
        state = state + k[..., t, :, None] * v[..., t, None, :]
        total = total + k[..., t, :]
    return torch.stack(out, -2) if out else torch.zeros_like(v)


@misconception(
    "recurrent",
    "The numbers are right, but they come from the table of all weights. The memory that is carried along must not depend "
    "on the length.",
)
def recurrent__by_the_table(q, k, v):
    return right.parallel(q, k, v)
