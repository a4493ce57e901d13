"""Day 30: known wrong solutions, each with the sentence for whoever wrote it."""

import torch
import torch.nn.functional as F
from torch import nn

from checker.testing import misconception
from reference import day30_deepseek_components as right
from reference.day08_linear_layers import Linear, linear


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


# SwiGLU


@misconception(
    "SwiGLU",
    "The silu is around up_proj. In the checkpoints it belongs to gate_proj: the names say which of the two is the gate, "
    "and loaded weights would change places.",
)
class SwiGLU__gate_and_up_exchanged(right.SwiGLU):
    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * right.silu(self.up_proj(x)))


@misconception(
    "SwiGLU",
    "You take the silu of the product. It acts on one factor alone: what it gives then lets the other factor through, or not.",
)
class SwiGLU__silu_of_the_product(right.SwiGLU):
    def forward(self, x):
        return self.down_proj(right.silu(self.gate_proj(x) * self.up_proj(x)))


@misconception(
    "SwiGLU",
    "The gate is a plain sigmoid, as in the first gated linear units. SiLU multiplies by its input once more.",
)
class SwiGLU__sigmoid(right.SwiGLU):
    def forward(self, x):
        return self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x))


@misconception(
    "SwiGLU",
    "This is GEGLU: the gate went through a GELU. The curves look alike, and differ by up to 0.2.",
)
class SwiGLU__gelu(right.SwiGLU):
    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


@misconception(
    "SwiGLU",
    "up_proj does nothing: this is an ordinary feed-forward layer with a silu, and no number is multiplied by a gate.",
)
class SwiGLU__without_up(right.SwiGLU):
    def forward(self, x):
        return self.down_proj(right.silu(self.gate_proj(x)))


@misconception(
    "SwiGLU",
    "Your layers have biases, for which the checkpoints have no names. All three go without.",
)
class SwiGLU__biases(right.SwiGLU):
    def __init__(self, d_model, d_ff):
        nn.Module.__init__(self)
        self.gate_proj, self.up_proj = Linear(d_model, d_ff), Linear(d_model, d_ff)
        self.down_proj = Linear(d_ff, d_model)


# softmax_gate


@misconception(
    "softmax_gate",
    "You take the softmax over the chosen logits alone. That is how Mixtral weights its experts, and it is the same as "
    "normalizing; the weights here are probabilities among all experts, and a row of them may sum to a tenth.",
)
def softmax_gate__over_the_chosen(logits, k, *, scaling=1.0, normalize=False, n_group=None, topk_group=None):
    indices = right._choose(_wide(logits).softmax(-1), k, n_group, topk_group, 1)
    weights = _wide(logits).gather(1, indices).softmax(-1)
    return (weights * scaling).to(logits.dtype), indices


@misconception(
    "softmax_gate",
    "normalize=True changed nothing. Some models divide by the sum of a row and others do not; this argument says which.",
)
def softmax_gate__never_normalizes(logits, k, *, scaling=1.0, normalize=False, n_group=None, topk_group=None):
    p = _wide(logits).softmax(-1)
    indices = right._choose(p, k, n_group, topk_group, 1)
    return (p.gather(1, indices) * scaling).to(logits.dtype), indices


@misconception(
    "softmax_gate",
    "With normalize the scaling is gone: your weights sum to 1 and not to the scaling. It multiplies in either case.",
)
def softmax_gate__scales_raw_weights_only(logits, k, *, scaling=1.0, normalize=False, n_group=None, topk_group=None):
    p = _wide(logits).softmax(-1)
    indices = right._choose(p, k, n_group, topk_group, 1)
    weights = p.gather(1, indices)
    weights = weights / weights.sum(-1, keepdim=True) if normalize else weights * scaling
    return weights.to(logits.dtype), indices


@misconception(
    "softmax_gate",
    "Raw weights are not scaled: only those that were normalized are. Without normalize DeepSeek-V2 multiplies by 16 too.",
)
def softmax_gate__scales_normalized_weights_only(
    logits, k, *, scaling=1.0, normalize=False, n_group=None, topk_group=None
):
    p = _wide(logits).softmax(-1)
    indices = right._choose(p, k, n_group, topk_group, 1)
    weights = p.gather(1, indices)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True) * scaling
    return weights.to(logits.dtype), indices


@misconception(
    "softmax_gate",
    "The scaling acts twice: 16 became 256. A model served like that answers fluently and solves far fewer problems.",
)
def softmax_gate__scales_twice(logits, k, *, scaling=1.0, normalize=False, n_group=None, topk_group=None):
    options = {"normalize": normalize, "n_group": n_group, "topk_group": topk_group}
    weights, indices = right.softmax_gate(logits, k, scaling=scaling, **options)
    return weights * scaling, indices


@misconception(
    "softmax_gate",
    "Your groups compete with the sum of their two best. That is DeepSeek-V3; in V2 the best one alone counts.",
)
def softmax_gate__groups_by_two(logits, k, *, scaling=1.0, normalize=False, n_group=None, topk_group=None):
    p = _wide(logits).softmax(-1)
    indices = right._choose(p, k, n_group, topk_group, 2)
    weights = p.gather(1, indices)
    weights = weights / weights.sum(-1, keepdim=True) if normalize else weights
    return (weights * scaling).to(logits.dtype), indices


@misconception(
    "softmax_gate",
    "Your groups compete with the sum of all their members. One outstanding expert loses against a crowd of middling ones: "
    "the largest probability decides.",
)
def softmax_gate__groups_by_sum(logits, k, *, scaling=1.0, normalize=False, n_group=None, topk_group=None):
    p = _wide(logits).softmax(-1)
    indices = right._choose(p, k, n_group, topk_group, logits.shape[-1])
    weights = p.gather(1, indices)
    weights = weights / weights.sum(-1, keepdim=True) if normalize else weights
    return (weights * scaling).to(logits.dtype), indices


@misconception(
    "softmax_gate",
    "Groups make no difference: the k best of all experts are chosen, also where they are spread over closed groups.",
)
def softmax_gate__ignores_groups(logits, k, *, scaling=1.0, normalize=False, n_group=None, topk_group=None):
    right._choose(_wide(logits), k, n_group, topk_group, 1)
    return right.softmax_gate(logits, k, scaling=scaling, normalize=normalize)


@misconception(
    "softmax_gate",
    "Your groups take turns: expert 0 in group 0, expert 1 in group 1, and so on. They are blocks of neighbours, since a "
    "group is what one device holds.",
)
def softmax_gate__groups_take_turns(logits, k, *, scaling=1.0, normalize=False, n_group=None, topk_group=None):
    p = _wide(logits).softmax(-1)
    right._choose(p, k, n_group, topk_group, 1)
    E, G = logits.shape[1], n_group or 1
    order = torch.arange(E, device=logits.device).reshape(E // G, G).T.flatten()
    indices = order[right._choose(p[:, order], k, n_group, topk_group, 1)]
    weights = p.gather(1, indices)
    weights = weights / weights.sum(-1, keepdim=True) if normalize else weights
    return (weights * scaling).to(logits.dtype), indices


@misconception(
    "softmax_gate",
    "The softmax runs after the closed groups were taken out, so that the open ones share all of the probability. A weight "
    "is the probability among all E experts.",
)
def softmax_gate__softmax_of_the_open(logits, k, *, scaling=1.0, normalize=False, n_group=None, topk_group=None):
    wide = _wide(logits)
    (N, E), G = logits.shape, n_group or 1
    groups = wide.reshape(N, G, E // G)
    best = groups.amax(-1).topk(topk_group or 1).indices
    closed = torch.ones(N, G, dtype=torch.bool, device=logits.device).scatter(1, best, False)
    p = groups.masked_fill(closed[..., None], -torch.inf).flatten(1).softmax(-1)
    indices = right._choose(wide, k, n_group, topk_group, 1)
    weights = p.gather(1, indices)
    weights = weights / weights.sum(-1, keepdim=True) if normalize else weights
    return (weights * scaling).to(logits.dtype), indices


@misconception(
    "softmax_gate",
    "The softmax is computed in half precision. Probabilities that differ by less than a part in 256 become equal there, and "
    "other experts are chosen: routers work in float32.",
)
def softmax_gate__in_half_precision(logits, k, *, scaling=1.0, normalize=False, n_group=None, topk_group=None):
    p = logits.softmax(-1)
    indices = right._choose(p, k, n_group, topk_group, 1)
    weights = p.gather(1, indices)
    weights = weights / weights.sum(-1, keepdim=True) if normalize else weights
    return weights * scaling, indices


@misconception(
    "softmax_gate",
    "Your softmax runs down the columns, over tokens. Each token distributes itself over experts: along a row.",
)
def softmax_gate__over_tokens(logits, k, *, scaling=1.0, normalize=False, n_group=None, topk_group=None):
    right._choose(logits, k, n_group, topk_group, 1)
    p = _wide(logits).softmax(0)
    indices = right._choose(p, k, n_group, topk_group, 1)
    weights = p.gather(1, indices)
    weights = weights / weights.sum(-1, keepdim=True) if normalize else weights
    return (weights * scaling).to(logits.dtype), indices


@misconception(
    "softmax_gate",
    "The weights are logits. They can be negative and of any size; take the probabilities of whom you chose.",
)
def softmax_gate__logits_as_weights(logits, k, *, scaling=1.0, normalize=False, n_group=None, topk_group=None):
    indices = right._choose(_wide(logits).softmax(-1), k, n_group, topk_group, 1)
    weights = _wide(logits).gather(1, indices)
    weights = weights / weights.sum(-1, keepdim=True) if normalize else weights
    return (weights * scaling).to(logits.dtype), indices


@misconception(
    "softmax_gate",
    "Closed groups got the value 0, and so do open experts whose probability underflows: between them the choice is a "
    "lottery. Closed means smaller than anything.",
)
def softmax_gate__closed_is_zero(logits, k, *, scaling=1.0, normalize=False, n_group=None, topk_group=None):
    p = _wide(logits).softmax(-1)
    right._choose(p, k, n_group, topk_group, 1)
    (N, E), G = logits.shape, n_group or 1
    groups = p.reshape(N, G, E // G)
    best = groups.amax(-1).topk(topk_group or 1).indices
    closed = torch.ones(N, G, dtype=torch.bool, device=logits.device).scatter(1, best, False)
    indices = groups.masked_fill(closed[..., None], 0.0).flatten(1).topk(k).indices
    weights = p.gather(1, indices)
    weights = weights / weights.sum(-1, keepdim=True) if normalize else weights
    return (weights * scaling).to(logits.dtype), indices


# sigmoid_gate


def _finish(scores, indices, logits, scaling, normalize):
    weights = scores.gather(1, indices)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return (weights * scaling).to(logits.dtype), indices


def _check(logits, bias, k, n_group, topk_group):
    right.sigmoid_gate(logits, bias, k, n_group=n_group, topk_group=topk_group)


@misconception(
    "sigmoid_gate",
    "The bias is in the returned weights. It decides who is chosen; how much an expert counts comes from s. Two widely "
    "used libraries shipped this, and with it every nudge of the balancing changes what the model says.",
)
def sigmoid_gate__bias_in_the_weights(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    _check(logits, bias, k, n_group, topk_group)
    scores = right.sigmoid(_wide(logits)) + bias
    return _finish(scores, right._choose(scores, k, n_group, topk_group, 2), logits, scaling, normalize)


@misconception(
    "sigmoid_gate",
    "Closed groups got the value 0. Where the biases are negative, 0 is larger than every open s + bias, and the closed ones "
    "win: exclude them with minus infinity.",
)
def sigmoid_gate__closed_is_zero(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    _check(logits, bias, k, n_group, topk_group)
    scores = right.sigmoid(_wide(logits))
    (N, E), G = logits.shape, n_group or 1
    groups = (scores + bias).reshape(N, G, E // G)
    best = groups.topk(min(2, E // G)).values.sum(-1).topk(topk_group or 1).indices
    closed = torch.ones(N, G, dtype=torch.bool, device=logits.device).scatter(1, best, False)
    indices = groups.masked_fill(closed[..., None], 0.0).flatten(1).topk(k).indices
    return _finish(scores, indices, logits, scaling, normalize)


@misconception(
    "sigmoid_gate",
    "Your groups compete with their best expert. That is DeepSeek-V2; in V3 the two best are added up.",
)
def sigmoid_gate__groups_by_max(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    _check(logits, bias, k, n_group, topk_group)
    scores = right.sigmoid(_wide(logits))
    return _finish(scores, right._choose(scores + bias, k, n_group, topk_group, 1), logits, scaling, normalize)


@misconception(
    "sigmoid_gate",
    "Your groups compete with the sum of all their members, of which only the two best are asked for.",
)
def sigmoid_gate__groups_by_sum(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    _check(logits, bias, k, n_group, topk_group)
    scores = right.sigmoid(_wide(logits))
    indices = right._choose(scores + bias, k, n_group, topk_group, logits.shape[1])
    return _finish(scores, indices, logits, scaling, normalize)


@misconception(
    "sigmoid_gate",
    "Groups make no difference: experts of closed groups are chosen.",
)
def sigmoid_gate__ignores_groups(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    _check(logits, bias, k, n_group, topk_group)
    return right.sigmoid_gate(logits, bias, k, n_group=1, topk_group=1, scaling=scaling, normalize=normalize)


@misconception(
    "sigmoid_gate",
    "The weights are not divided by their sum: a row should sum to the scaling, and yours sums to anything. The default is "
    "normalize=True.",
)
def sigmoid_gate__never_normalizes(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    options = {"n_group": n_group, "topk_group": topk_group}
    return right.sigmoid_gate(logits, bias, k, scaling=scaling, normalize=False, **options)


@misconception(
    "sigmoid_gate",
    "normalize=False made no difference: the weights are divided by their sum in either case.",
)
def sigmoid_gate__always_normalizes(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    options = {"n_group": n_group, "topk_group": topk_group}
    return right.sigmoid_gate(logits, bias, k, scaling=scaling, normalize=True, **options)


@misconception(
    "sigmoid_gate",
    "Only normalized weights are scaled. The scaling stands after the condition, not in it.",
)
def sigmoid_gate__scales_normalized_weights_only(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    options = {"n_group": n_group, "topk_group": topk_group, "normalize": normalize}
    return right.sigmoid_gate(logits, bias, k, scaling=scaling if normalize else 1.0, **options)


@misconception(
    "sigmoid_gate",
    "The scaling acts twice: a row sums to its square.",
)
def sigmoid_gate__scales_twice(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    options = {"n_group": n_group, "topk_group": topk_group, "normalize": normalize}
    weights, indices = right.sigmoid_gate(logits, bias, k, scaling=scaling, **options)
    return weights * scaling, indices


@misconception(
    "sigmoid_gate",
    "The weights were scaled first and divided by their sum afterwards, so that the scaling cancels: a row sums to 1.",
)
def sigmoid_gate__scaling_cancels(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    options = {"n_group": n_group, "topk_group": topk_group, "normalize": normalize}
    return right.sigmoid_gate(logits, bias, k, scaling=1.0 if normalize else scaling, **options)


@misconception(
    "sigmoid_gate",
    "You found s again by subtracting the bias from s + bias. With s = 1e-8 and a bias of 3 the sum is 3 in float32, and the "
    "difference 0: keep s.",
)
def sigmoid_gate__subtracts_the_bias(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    _check(logits, bias, k, n_group, topk_group)
    choice = right.sigmoid(_wide(logits)) + bias
    return _finish(choice - bias, right._choose(choice, k, n_group, topk_group, 2), logits, scaling, normalize)


@misconception(
    "sigmoid_gate",
    "Groups are judged without the bias, only experts with it. All of who is chosen is decided by s + bias.",
)
def sigmoid_gate__groups_without_bias(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    _check(logits, bias, k, n_group, topk_group)
    scores = right.sigmoid(_wide(logits))
    (N, E), G = logits.shape, n_group or 1
    best = scores.reshape(N, G, E // G).topk(min(2, E // G)).values.sum(-1).topk(topk_group or 1).indices
    closed = torch.ones(N, G, dtype=torch.bool, device=logits.device).scatter(1, best, False)
    choice = (scores + bias).reshape(N, G, E // G).masked_fill(closed[..., None], -torch.inf).flatten(1)
    return _finish(scores, choice.topk(k).indices, logits, scaling, normalize)


@misconception(
    "sigmoid_gate",
    "Groups are judged with the bias, but experts inside them without it.",
)
def sigmoid_gate__experts_without_bias(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    _check(logits, bias, k, n_group, topk_group)
    scores = right.sigmoid(_wide(logits))
    (N, E), G = logits.shape, n_group or 1
    best = (scores + bias).reshape(N, G, E // G).topk(min(2, E // G)).values.sum(-1).topk(topk_group or 1).indices
    closed = torch.ones(N, G, dtype=torch.bool, device=logits.device).scatter(1, best, False)
    choice = scores.reshape(N, G, E // G).masked_fill(closed[..., None], -torch.inf).flatten(1)
    return _finish(scores, choice.topk(k).indices, logits, scaling, normalize)


@misconception(
    "sigmoid_gate",
    "The bias is not used: who is chosen depends on s alone, and balancing has no hold on it.",
)
def sigmoid_gate__no_bias(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    _check(logits, bias, k, n_group, topk_group)
    options = {"n_group": n_group, "topk_group": topk_group, "normalize": normalize}
    return right.sigmoid_gate(logits, torch.zeros_like(bias), k, scaling=scaling, **options)


@misconception(
    "sigmoid_gate",
    "The bias was added to the logits, inside the sigmoid. There it is squeezed, changes the weights, and a nudge of 0.001 "
    "means something else for every token.",
)
def sigmoid_gate__bias_on_the_logits(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    _check(logits, bias, k, n_group, topk_group)
    scores = right.sigmoid(_wide(logits) + bias)
    return _finish(scores, right._choose(scores, k, n_group, topk_group, 2), logits, scaling, normalize)


@misconception(
    "sigmoid_gate",
    "This is a softmax: experts compete for one probability. In DeepSeek-V3 each has a sigmoid of its own.",
)
def sigmoid_gate__softmax(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    _check(logits, bias, k, n_group, topk_group)
    scores = _wide(logits).softmax(-1)
    return _finish(scores, right._choose(scores + bias, k, n_group, topk_group, 2), logits, scaling, normalize)


@misconception(
    "sigmoid_gate",
    "You divide by the sum of all E sigmoids. The sum runs over the k that were chosen.",
)
def sigmoid_gate__normalizes_over_all(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    _check(logits, bias, k, n_group, topk_group)
    scores = right.sigmoid(_wide(logits))
    indices = right._choose(scores + bias, k, n_group, topk_group, 2)
    if normalize:
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    return _finish(scores, indices, logits, scaling, False)


@misconception(
    "sigmoid_gate",
    "Where all chosen s are 0, 0 is divided by 0. The sum gets 1e-20 added.",
)
def sigmoid_gate__nothing_by_nothing(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    options = {"n_group": n_group, "topk_group": topk_group}
    weights, indices = right.sigmoid_gate(_wide(logits), bias, k, scaling=1.0, normalize=False, **options)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return (weights * scaling).to(logits.dtype), indices


@misconception(
    "sigmoid_gate",
    "The sum got 1e-6 added. Sigmoids of 1e-8 are all smaller than that, so the row sums to almost nothing: 1e-20 is asked for.",
)
def sigmoid_gate__a_large_epsilon(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    options = {"n_group": n_group, "topk_group": topk_group}
    weights, indices = right.sigmoid_gate(_wide(logits), bias, k, scaling=1.0, normalize=False, **options)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    return (weights * scaling).to(logits.dtype), indices


@misconception(
    "sigmoid_gate",
    "The sigmoid is computed in half precision, where near neighbours are equal, and other experts are chosen. Routers work in "
    "float32.",
)
def sigmoid_gate__in_half_precision(logits, bias, k, *, n_group, topk_group, scaling=2.5, normalize=True):
    _check(logits, bias, k, n_group, topk_group)
    scores = torch.sigmoid(logits)
    choice = scores + bias.to(scores.dtype)
    return _finish(scores, right._choose(choice, k, n_group, topk_group, 2), logits, scaling, normalize)


# dispatch


@misconception(
    "dispatch",
    "Each expert runs on all tokens, and most of what they say is multiplied by 0. The numbers are right, the work is E / K "
    "times too much: the meter sees it.",
)
def dispatch__all_experts_on_all_tokens(x, weights, indices, experts):
    right._check_assignments(x, weights, indices)
    table = _wide(weights).new_zeros(len(x), len(experts)).scatter_add(1, indices, _wide(weights))
    out = torch.zeros_like(_wide(x))
    for e, expert in enumerate(experts):
        if (indices == e).any():
            out = out + (expert(x) * table[:, e : e + 1]).to(out.dtype)
    return out.to(x.dtype)


@misconception(
    "dispatch",
    "`out[rows] += ...` with a row that stands there several times keeps one of the summands and loses the others: an indexed "
    "assignment does not add up.",
)
def dispatch__indexed_assignment(x, weights, indices, experts):
    right._check_assignments(x, weights, indices)
    said = torch.zeros(*indices.shape, x.shape[1], dtype=_wide(x).dtype, device=x.device)
    for e, expert in enumerate(experts):
        rows, slots = torch.where(indices == e)
        if len(rows):
            said[rows, slots] = expert(x[rows]).to(said.dtype)
    K = indices.shape[1]
    rows = torch.arange(len(x), device=x.device).repeat_interleave(K)
    out = torch.zeros_like(_wide(x))
    out[rows] += (said * _wide(weights)[..., None]).flatten(0, 1).to(out.dtype)
    return out.to(x.dtype)


@misconception(
    "dispatch",
    "Experts that nobody chose are called with an empty tensor. Most experts are idle when a single token is decoded, and each "
    "empty call costs several kernels.",
)
def dispatch__calls_idle_experts(x, weights, indices, experts):
    right._check_assignments(x, weights, indices)
    out = torch.zeros_like(_wide(x))
    for e, expert in enumerate(experts):
        rows, slots = torch.where(indices == e)
        out.index_add_(0, rows, (expert(x[rows]) * _wide(weights)[rows, slots, None]).to(out.dtype))
    return out.to(x.dtype)


@misconception(
    "dispatch",
    "Experts are called once for each of the K columns. Gather all the tokens of an expert, from whatever column, and call it "
    "once.",
)
def dispatch__one_column_at_a_time(x, weights, indices, experts):
    right._check_assignments(x, weights, indices)
    out = torch.zeros_like(_wide(x))
    for slot in range(indices.shape[1]):
        for e, expert in enumerate(experts):
            rows = torch.where(indices[:, slot] == e)[0]
            if len(rows):
                out.index_add_(0, rows, (expert(x[rows]) * _wide(weights)[rows, slot, None]).to(out.dtype))
    return out.to(x.dtype)


@misconception(
    "dispatch",
    "A later expert writes over what an earlier one said: each row holds a single summand.",
)
def dispatch__overwrites(x, weights, indices, experts):
    right._check_assignments(x, weights, indices)
    out = torch.zeros_like(_wide(x))
    for e, expert in enumerate(experts):
        rows, slots = torch.where(indices == e)
        if len(rows):
            out[rows] = (expert(x[rows]) * _wide(weights)[rows, slots, None]).to(out.dtype)
    return out.to(x.dtype)


@misconception(
    "dispatch",
    "The weights multiply what goes into the experts. An expert is not linear: multiply what comes out.",
)
def dispatch__weights_the_input(x, weights, indices, experts):
    right._check_assignments(x, weights, indices)
    out = torch.zeros_like(_wide(x))
    for e, expert in enumerate(experts):
        rows, slots = torch.where(indices == e)
        if len(rows):
            out.index_add_(0, rows, expert((x[rows] * weights[rows, slots, None]).to(x.dtype)).to(out.dtype))
    return out.to(x.dtype)


@misconception(
    "dispatch",
    "The experts' answers are added without their weights.",
)
def dispatch__no_weights(x, weights, indices, experts):
    return right.dispatch(x, torch.ones_like(weights), indices, experts)


@misconception(
    "dispatch",
    "The sum is kept in half precision and rounded after each expert. Weight and add in float32, and round once at the end.",
)
def dispatch__adds_in_half_precision(x, weights, indices, experts):
    right._check_assignments(x, weights, indices)
    out = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        rows, slots = torch.where(indices == e)
        if len(rows):
            out.index_add_(0, rows, (expert(x[rows]) * weights[rows, slots, None]).to(x.dtype))
    return out


@misconception(
    "dispatch",
    "Where a row names an expert twice, only the first of its weights counts.",
)
def dispatch__first_weight_only(x, weights, indices, experts):
    right._check_assignments(x, weights, indices)
    out = torch.zeros_like(_wide(x))
    for e, expert in enumerate(experts):
        hits = indices == e
        rows = hits.any(1).nonzero().flatten()
        if len(rows):
            share = _wide(weights)[rows, hits[rows].int().argmax(1)]
            out.index_add_(0, rows, (expert(x[rows]) * share[:, None]).to(out.dtype))
    return out.to(x.dtype)


@misconception(
    "dispatch",
    "The weights are taken from column e, as if (N, K) were a table of all experts. Column i belongs to indices[:, i].",
)
def dispatch__weights_by_expert_number(x, weights, indices, experts):
    right._check_assignments(x, weights, indices)
    out = torch.zeros_like(_wide(x))
    for e, expert in enumerate(experts):
        rows, _ = torch.where(indices == e)
        if len(rows):
            share = _wide(weights)[rows, min(e, weights.shape[1] - 1)]
            out.index_add_(0, rows, (expert(x[rows]) * share[:, None]).to(out.dtype))
    return out.to(x.dtype)


# MoE


@misconception(
    "MoE",
    "The shared experts are multiplied by the scaling, too. It belongs to the router's weights; what all tokens see is added "
    "as it is.",
)
class MoE__scales_the_shared_experts(right.MoE):
    def forward(self, x):
        out = super().forward(x)
        return out if self.shared_experts is None else out + (self.options["scaling"] - 1) * self.shared_experts(x)


@misconception(
    "MoE",
    "The shared experts are in the state dict but not in the result.",
)
class MoE__forgets_the_shared_experts(right.MoE):
    def forward(self, x):
        out = super().forward(x)
        return out if self.shared_experts is None else out - self.shared_experts(x)


@misconception(
    "MoE",
    "The token itself was added. The residual connection is the business of the block around this layer.",
)
class MoE__adds_a_residual(right.MoE):
    def forward(self, x):
        return x + super().forward(x)


@misconception(
    "MoE",
    "Your shared experts are a list. In the checkpoints they are one SwiGLU, n_shared_experts times as wide.",
)
class MoE__a_list_of_shared_experts(right.MoE):
    def __init__(self, cfg):
        super().__init__(cfg)
        if cfg.n_shared_experts:
            D, width = cfg.hidden_size, cfg.moe_intermediate_size
            self.shared_experts = nn.ModuleList(right.SwiGLU(D, width) for _ in range(cfg.n_shared_experts))

    def forward(self, x):
        shared, self.shared_experts = self.shared_experts, None
        try:
            out = super().forward(x)
        finally:
            self.shared_experts = shared
        for expert in shared or ():
            out = out + expert(x)
        return out


@misconception(
    "MoE",
    "Your shared path has the width of one expert, whatever n_shared_experts says.",
)
class MoE__one_shared_expert(right.MoE):
    def __init__(self, cfg):
        super().__init__(cfg)
        if cfg.n_shared_experts:
            self.shared_experts = right.SwiGLU(cfg.hidden_size, cfg.moe_intermediate_size)


@misconception(
    "MoE",
    "The router's product is computed in half precision. Logits of 1.002 and 1.003 are equal there, and two tokens that should "
    "part get the same expert: widen both factors first.",
)
class MoE__router_in_half_precision(right.MoE):
    def _route(self, rows):
        logits = linear(rows, self.gate.weight)
        bias = getattr(self.gate, "e_score_correction_bias", None)
        if bias is None:
            return right.softmax_gate(logits, self.k, **self.options)
        return right.sigmoid_gate(logits, bias, self.k, **self.options)


@misconception(
    "MoE",
    "The bias is a parameter: an optimizer would decay it, though no gradient ever reaches it. It is state that a rule of its "
    "own changes, a buffer.",
)
class MoE__bias_is_a_parameter(right.MoE):
    def __init__(self, cfg):
        super().__init__(cfg)
        if cfg.scoring_func == "sigmoid":
            bias = self.gate.e_score_correction_bias
            del self.gate.e_score_correction_bias
            self.gate.e_score_correction_bias = nn.Parameter(bias)


@misconception(
    "MoE",
    "The bias is not in the state dict, so that a loaded model routes without it.",
)
class MoE__bias_is_not_saved(right.MoE):
    def __init__(self, cfg):
        super().__init__(cfg)
        if cfg.scoring_func == "sigmoid":
            bias = self.gate.e_score_correction_bias
            del self.gate.e_score_correction_bias
            self.gate.register_buffer("e_score_correction_bias", bias, persistent=False)


@misconception(
    "MoE",
    "The bias sits beside the router. In the checkpoints its name is gate.e_score_correction_bias.",
)
class MoE__bias_beside_the_gate(right.MoE):
    def __init__(self, cfg):
        super().__init__(cfg)
        if cfg.scoring_func == "sigmoid":
            self.register_buffer("e_score_correction_bias", self.gate.e_score_correction_bias)
            del self.gate.e_score_correction_bias

    def _route(self, rows):
        logits = linear(_wide(rows), _wide(self.gate.weight))
        if not hasattr(self, "e_score_correction_bias"):
            return right.softmax_gate(logits, self.k, **self.options)
        return right.sigmoid_gate(logits, self.e_score_correction_bias, self.k, **self.options)


@misconception(
    "MoE",
    "The bias was made in the default dtype. A model that is built in bfloat16 would round away nudges of 0.001.",
)
class MoE__bias_in_the_default_dtype(right.MoE):
    def __init__(self, cfg):
        super().__init__(cfg)
        if cfg.scoring_func == "sigmoid":
            self.gate.e_score_correction_bias = torch.zeros(cfg.n_routed_experts)


@misconception(
    "MoE",
    "The bias is loaded and never used.",
)
class MoE__ignores_the_bias(right.MoE):
    def _route(self, rows):
        logits = linear(_wide(rows), _wide(self.gate.weight))
        bias = getattr(self.gate, "e_score_correction_bias", None)
        if bias is None:
            return right.softmax_gate(logits, self.k, **self.options)
        return right.sigmoid_gate(logits, torch.zeros_like(bias), self.k, **self.options)


@misconception(
    "MoE",
    "norm_topk_prob is not read: the weights stay as they are, also where the configuration says that they are divided by "
    "their sum.",
)
class MoE__ignores_norm_topk_prob(right.MoE):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.options["normalize"] = False


@misconception(
    "MoE",
    "Weights are always divided by their sum. norm_topk_prob is False in DeepSeek-V2.",
)
class MoE__always_normalizes(right.MoE):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.options["normalize"] = True


@misconception(
    "MoE",
    "routed_scaling_factor is not read. In DeepSeek-V2-Lite it is 1 and nobody notices; in V2 it is 16.",
)
class MoE__ignores_the_scaling(right.MoE):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.options["scaling"] = 1.0


@misconception(
    "MoE",
    "n_group and topk_group are not read: experts of closed groups are chosen.",
)
class MoE__ignores_groups(right.MoE):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.options["n_group"] = self.options["topk_group"] = None


# update_bias


@misconception(
    "update_bias",
    "The bias moves the wrong way: crowded experts become even more attractive. Who gets too little is raised.",
)
def update_bias__the_wrong_way(bias, counts, rate):
    return right.update_bias(bias, counts, -rate)


@misconception(
    "update_bias",
    "Your step grows with the distance from the mean. Each step has the same size, the rate, and only its direction comes from "
    "the counts.",
)
def update_bias__in_proportion(bias, counts, rate):
    right.update_bias(bias, counts, rate)
    counts = counts.to(bias.dtype)
    return bias + rate * (counts.mean() - counts)


@misconception(
    "update_bias",
    "An expert that gets exactly the mean is nudged too. It has what it should have: leave it alone.",
)
def update_bias__no_rest(bias, counts, rate):
    right.update_bias(bias, counts, rate)
    counts = counts.double()
    return torch.where(counts > counts.mean(), bias - rate, bias + rate)


@misconception(
    "update_bias",
    "The mean was rounded down to an integer. With counts 1, 2, 2, 2 it is 1.75, and the first expert lies below it.",
)
def update_bias__integer_mean(bias, counts, rate):
    right.update_bias(bias, counts, rate)
    return bias + rate * (counts.long().sum() // len(counts) - counts.long()).sign().to(bias.dtype)


@misconception(
    "update_bias",
    "Experts are compared with the median. Where two of them get nearly all tokens, that is 0, and hardly anybody moves.",
)
def update_bias__median(bias, counts, rate):
    right.update_bias(bias, counts, rate)
    return bias + rate * (counts.double().median() - counts.double()).sign().to(bias.dtype)


# balance_loss


def _parts(scores, indices, mask):
    """Counts and sums of scores (E,) and the number of tokens that count."""
    right._check_scores(scores, indices, mask)
    keep = torch.ones(len(scores), dtype=torch.bool, device=scores.device) if mask is None else mask
    counts = torch.bincount(indices[keep].flatten(), minlength=scores.shape[1])
    return counts.to(_wide(scores).dtype), _wide(scores)[keep].sum(0), keep.sum().clamp(min=1)


@misconception(
    "balance_loss",
    "Perfect balance costs you K times alpha: each token chooses K experts, so the share of the load is the count over K N.",
)
def balance_loss__forgets_k(scores, indices, alpha, *, mask=None):
    return right.balance_loss(scores, indices, alpha * indices.shape[1], mask=mask)


@misconception(
    "balance_loss",
    "The factor E is missing: perfect balance would cost alpha / E, and the weight of the loss would depend on the size of the "
    "model.",
)
def balance_loss__forgets_e(scores, indices, alpha, *, mask=None):
    return right.balance_loss(scores, indices, alpha / scores.shape[1], mask=mask)


@misconception(
    "balance_loss",
    "Both factors come from counts. Counts have no gradient, so that this loss teaches nothing: one of the factors is the mean "
    "score.",
)
def balance_loss__counts_twice(scores, indices, alpha, *, mask=None):
    counts, _, n = _parts(scores, indices, mask)
    E, K = scores.shape[1], indices.shape[1]
    return (alpha * (counts * E / (K * n) * counts / (K * n)).sum() + 0 * scores.sum()).to(scores.dtype)


@misconception(
    "balance_loss",
    "Both factors come from the mean scores. The load is what was chosen, not what was likely.",
)
def balance_loss__scores_twice(scores, indices, alpha, *, mask=None):
    _, total, n = _parts(scores, indices, mask)
    return (alpha * scores.shape[1] * (total / n).square().sum()).to(scores.dtype)


@misconception(
    "balance_loss",
    "The load adds up the scores of the chosen, and has a gradient of its own. It counts each choice as 1, and the gradient "
    "goes through the mean score alone.",
)
def balance_loss__soft_counts(scores, indices, alpha, *, mask=None):
    _, total, n = _parts(scores, indices, mask)
    keep = torch.ones(len(scores), dtype=torch.bool, device=scores.device) if mask is None else mask
    wide, chosen = _wide(scores)[keep], indices[keep]
    E, K = scores.shape[1], indices.shape[1]
    load = torch.zeros_like(wide).scatter_add(1, chosen, wide.gather(1, chosen)).sum(0) * E / (K * n)
    return (alpha * (load * total / n).sum()).to(scores.dtype)


@misconception(
    "balance_loss",
    "The mean score is taken over the tokens that chose the expert. P is the mean over all tokens that count.",
)
def balance_loss__mean_over_the_chosen(scores, indices, alpha, *, mask=None):
    counts, _, n = _parts(scores, indices, mask)
    keep = torch.ones(len(scores), dtype=torch.bool, device=scores.device) if mask is None else mask
    wide, chosen = _wide(scores)[keep], indices[keep]
    E, K = scores.shape[1], indices.shape[1]
    hits = torch.zeros_like(wide).scatter(1, chosen, 1.0)
    mean = (wide * hits).sum(0) / hits.sum(0).clamp(min=1)
    return (alpha * (counts * E / (K * n) * mean).sum()).to(scores.dtype)


@misconception(
    "balance_loss",
    "The mask has no effect: padding counts as tokens.",
)
def balance_loss__ignores_the_mask(scores, indices, alpha, *, mask=None):
    right._check_scores(scores, indices, mask)
    return right.balance_loss(scores, indices, alpha)


@misconception(
    "balance_loss",
    "Padding is left out of the counts and the scores, but N still is the number of all rows. It is the number of those that "
    "count.",
)
def balance_loss__divides_by_all(scores, indices, alpha, *, mask=None):
    counts, total, _ = _parts(scores, indices, mask)
    E, K, n = scores.shape[1], indices.shape[1], max(1, len(scores))
    return (alpha * (counts * E / (K * n) * total / n).sum()).to(scores.dtype)


@misconception(
    "balance_loss",
    "Without tokens this is 0 / 0, and one NaN in a loss ends a training run.",
)
def balance_loss__nan_without_tokens(scores, indices, alpha, *, mask=None):
    right._check_scores(scores, indices, mask)
    keep = torch.ones(len(scores), dtype=torch.bool, device=scores.device) if mask is None else mask
    found = right.balance_loss(scores, indices, alpha, mask=mask)
    return found + 0 * (1.0 / keep.sum()) if keep.any() else found * torch.nan


# sequence_balance_loss


@misconception(
    "sequence_balance_loss",
    "All tokens of the batch are counted together. Then two sequences that each crowd one half of the experts look balanced.",
)
def sequence_balance_loss__all_together(scores, indices, alpha, *, mask=None):
    right._check_scores(scores, indices, mask)
    wide = _wide(scores)
    wide = wide / (wide.sum(-1, keepdim=True) + 1e-20)
    mask = None if mask is None else mask.flatten()
    return right.balance_loss(wide.flatten(0, 1), indices.flatten(0, 1), alpha, mask=mask).to(scores.dtype)


@misconception(
    "sequence_balance_loss",
    "The scores are used as they are. Sigmoids of a token do not sum to 1: divide each row by its sum first.",
)
def sequence_balance_loss__not_normalized(scores, indices, alpha, *, mask=None):
    right._check_scores(scores, indices, mask)
    mask = torch.ones_like(scores[..., 0], dtype=torch.bool) if mask is None else mask
    total = right._load_times_score(_wide(scores), indices, mask).sum()
    return (alpha * total / mask.any(-1).sum().clamp(min=1)).to(scores.dtype)


@misconception(
    "sequence_balance_loss",
    "The losses of the sequences are added up: a larger batch costs more. Take their mean.",
)
def sequence_balance_loss__sum_over_sequences(scores, indices, alpha, *, mask=None):
    right._check_scores(scores, indices, mask)
    present = torch.ones_like(scores[..., 0], dtype=torch.bool) if mask is None else mask
    return right.sequence_balance_loss(scores, indices, alpha, mask=mask) * present.any(-1).sum().to(scores.dtype)


@misconception(
    "sequence_balance_loss",
    "A sequence of padding alone counts as a sequence with loss 0 and lowers the average. Leave it out.",
)
def sequence_balance_loss__counts_empty_sequences(scores, indices, alpha, *, mask=None):
    right._check_scores(scores, indices, mask)
    present = torch.ones_like(scores[..., 0], dtype=torch.bool) if mask is None else mask
    share = present.any(-1).to(_wide(scores).dtype).mean() if len(scores) else 0.0
    return (right.sequence_balance_loss(scores, indices, alpha, mask=mask) * share).to(scores.dtype)


@misconception(
    "sequence_balance_loss",
    "The mask has no effect: padding counts as tokens.",
)
def sequence_balance_loss__ignores_the_mask(scores, indices, alpha, *, mask=None):
    right._check_scores(scores, indices, mask)
    return right.sequence_balance_loss(scores, indices, alpha)


@misconception(
    "sequence_balance_loss",
    "Scores are divided by their sum over the tokens of the sequence. Each token is normalized by itself, over its experts.",
)
def sequence_balance_loss__normalized_over_tokens(scores, indices, alpha, *, mask=None):
    right._check_scores(scores, indices, mask)
    wide = _wide(scores)
    mask = torch.ones_like(scores[..., 0], dtype=torch.bool) if mask is None else mask
    wide = wide / (wide.sum(1, keepdim=True) + 1e-20)
    total = right._load_times_score(wide, indices, mask).sum()
    return (alpha * total / mask.any(-1).sum().clamp(min=1)).to(scores.dtype)


# simulate


@misconception(
    "simulate",
    "The violation is the largest count over the mean, without taking off 1. Perfect balance is 0.",
)
def simulate__without_minus_one(gate_w, data, steps, *, k=2, rate=0.01):
    bias, violations = right.simulate(gate_w, data, steps, k=k, rate=rate)
    return bias, violations + 1


@misconception(
    "simulate",
    "One violation is missing: there are steps + 1 of them, the first with a bias of zeros and the last with the final one.",
)
def simulate__misses_the_last(gate_w, data, steps, *, k=2, rate=0.01):
    bias, violations = right.simulate(gate_w, data, steps, k=k, rate=rate)
    return bias, violations[:-1]


@misconception(
    "simulate",
    "The bias moves one step more than it is asked to.",
)
def simulate__one_step_too_many(gate_w, data, steps, *, k=2, rate=0.01):
    violations = right.simulate(gate_w, data, steps, k=k, rate=rate)[1]
    return right.simulate(gate_w, data, steps + 1, k=k, rate=rate)[0], violations


@misconception(
    "simulate",
    "Each token chooses one expert, whatever k is.",
)
def simulate__one_choice(gate_w, data, steps, *, k=2, rate=0.01):
    return right.simulate(gate_w, data, steps, k=1, rate=rate)


# devices_touched


@misconception(
    "devices_touched",
    "Your experts are dealt out in turn, expert e on device e mod n_devices. They lie in blocks: neighbours share a device.",
)
def devices_touched__in_turn(indices, n_devices, *, n_experts):
    right.devices_touched(indices, n_devices, n_experts=n_experts)
    device = indices % n_devices
    return (device[..., None] == torch.arange(n_devices, device=indices.device)).any(1).sum(1)


@misconception(
    "devices_touched",
    "A device is counted once for each expert on it. Different devices are asked for, and a token travels to each one once.",
)
def devices_touched__counts_experts(indices, n_devices, *, n_experts):
    right.devices_touched(indices, n_devices, n_experts=n_experts)
    return torch.full((len(indices),), indices.shape[1], device=indices.device)


@misconception(
    "devices_touched",
    "You count where neighbours in a row differ, and a row need not be sorted: device 0, 1, 0 is two devices, not three.",
)
def devices_touched__unsorted(indices, n_devices, *, n_experts):
    right.devices_touched(indices, n_devices, n_experts=n_experts)
    device = indices // (n_experts // n_devices)
    return 1 + (device.diff(dim=1) != 0).sum(1)


@misconception(
    "devices_touched",
    "The number of devices was taken for the number of experts on one of them.",
)
def devices_touched__devices_as_size(indices, n_devices, *, n_experts):
    right.devices_touched(indices, n_devices, n_experts=n_experts)
    device = indices // n_devices
    return (device[..., None] == torch.arange(n_experts, device=indices.device)).any(1).sum(1)


# grouped_dispatch


@misconception(
    "grouped_dispatch",
    "Every expert runs on all N tokens in one batched product. The loop is gone, and so is the saving: E / K times the work.",
)
def grouped_dispatch__all_on_all(x, weights, indices, w_gate, w_up, w_down):
    right._check_assignments(x, weights, indices)
    table = _wide(weights).new_zeros(len(x), len(w_gate)).scatter_add(1, indices, _wide(weights))
    hidden = F.silu(x @ w_gate.mT) * (x @ w_up.mT)
    said = hidden @ w_down.mT
    return (said.to(table.dtype) * table.T[..., None]).sum(0).to(x.dtype)


@misconception(
    "grouped_dispatch",
    "The weights of the experts are copied for each assignment: N K matrices of F D numbers, which a GPU has no room for. "
    "Bring the tokens to the experts.",
)
def grouped_dispatch__copies_the_weights(x, weights, indices, w_gate, w_up, w_down):
    right._check_assignments(x, weights, indices)
    flat = indices.flatten()
    rows = x.repeat_interleave(indices.shape[1], 0)[:, None]
    hidden = F.silu(rows @ w_gate[flat].mT) * (rows @ w_up[flat].mT)
    said = _wide((hidden @ w_down[flat].mT)[:, 0]) * _wide(weights).flatten()[:, None]
    return said.view(*indices.shape, x.shape[1]).sum(1).to(x.dtype)


@misconception(
    "grouped_dispatch",
    "Each expert takes its fair share of tokens, N K / E, and what comes after that is dropped. Here every token is served: the "
    "blocks are as long as the longest group.",
)
def grouped_dispatch__drops_tokens(x, weights, indices, w_gate, w_up, w_down):
    right._check_assignments(x, weights, indices)
    flat = indices.flatten()
    place = F.one_hot(flat, len(w_gate)).cumsum(0).gather(1, flat[:, None])[:, 0] - 1
    keep = place < -(-len(flat) // len(w_gate))
    kept = torch.where(keep.view(indices.shape), weights, torch.zeros_like(weights))
    return right.grouped_dispatch(x, kept, indices, w_gate, w_up, w_down)


@misconception(
    "grouped_dispatch",
    "The weights are not put into the order of the sorted assignments: each answer is multiplied by somebody else's weight.",
)
def grouped_dispatch__weights_out_of_order(x, weights, indices, w_gate, w_up, w_down):
    right._check_assignments(x, weights, indices)
    order = indices.flatten().argsort(stable=True)
    wrong = torch.empty_like(weights.flatten())
    wrong = wrong.scatter(0, order, weights.flatten()).view(weights.shape)
    return right.grouped_dispatch(x, wrong, indices, w_gate, w_up, w_down)


@misconception(
    "grouped_dispatch",
    "The answers are written into the result by an indexed assignment, and each token keeps one of its K: add them up.",
)
def grouped_dispatch__keeps_one(x, weights, indices, w_gate, w_up, w_down):
    right._check_assignments(x, weights, indices)
    last = torch.zeros_like(weights)
    last[:, -1:] = weights[:, -1:]
    return right.grouped_dispatch(x, last, indices, w_gate, w_up, w_down)


@misconception(
    "grouped_dispatch",
    "The sum is kept in half precision. Weight and add in float32, and round once at the end.",
)
def grouped_dispatch__adds_in_half_precision(x, weights, indices, w_gate, w_up, w_down):
    right._check_assignments(x, weights, indices)
    E, K, D = len(w_gate), indices.shape[1], x.shape[1]
    owner, order = indices.flatten().sort(stable=True)
    sizes = torch.bincount(owner, minlength=E)
    place = torch.arange(len(owner), device=x.device) - (sizes.cumsum(0) - sizes)[owner]
    blocks = x.new_zeros(E, int(sizes.max()), D).index_put((owner, place), x[order // K])
    said = ((F.silu(blocks @ w_gate.mT) * (blocks @ w_up.mT)) @ w_down.mT)[owner, place]
    share = weights.flatten()[order].to(x.dtype)
    return torch.zeros_like(x).index_add(0, order // K, said * share[:, None])
