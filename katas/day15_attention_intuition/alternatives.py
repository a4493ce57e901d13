"""Day 15: right solutions, written differently."""

import math

import torch
from torch import nn

from checker.testing import alternative
from reference.day15_attention_intuition import soft_lookup


def _refuse(q, keys, values):
    if q.size(-1) != keys.size(-1):
        raise ValueError(f"q is {q.shape}, keys are {keys.shape}")
    if keys.size(0) != values.size(0):
        raise ValueError(f"keys are {keys.shape}, values are {values.shape}")
    if keys.size(0) == 0:
        raise ValueError(f"no entry: keys are {keys.shape}")


# hard_lookup


@alternative("hard_lookup")
def hard_lookup__query_by_query(q, keys, values):
    _refuse(q, keys, values)
    answers = []
    for query in q:
        scores = [float(torch.dot(query.double(), key.double())) for key in keys]
        answers.append(values[scores.index(max(scores))])
    return torch.stack(answers) if answers else values[:0].clone()


@alternative("hard_lookup")
def hard_lookup__index_select(q, keys, values):
    _refuse(q, keys, values)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qd,nd->nq", q.to(wide), keys.to(wide))
    return torch.index_select(values, 0, torch.argmax(scores, dim=0))


# soft_lookup


@alternative("soft_lookup")
def soft_lookup__einsum(q, keys, values, temperature=1.0):
    _refuse(q, keys, values)
    if math.isnan(temperature) or temperature <= 0:
        raise ValueError(f"temperature {temperature}")
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qd,nd->qn", q.to(wide), keys.to(wide))
    top = scores.detach().max(dim=-1, keepdim=True).values
    weights = ((scores - top) / temperature).exp()
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return torch.einsum("qn,nv->qv", weights, values.to(wide)).to(q.dtype), weights.to(q.dtype)


@alternative("soft_lookup")
def soft_lookup__keys_in_rows(q, keys, values, temperature=1.0):
    _refuse(q, keys, values)
    if not temperature > 0.0:
        raise ValueError(f"{temperature} is no temperature")
    half = q.dtype in (torch.float16, torch.bfloat16)
    queries, keys, values = (x.float() if half else x for x in (q, keys, values))
    scores = keys.matmul(queries.t()).t()
    weights = torch.softmax((scores - scores.max(1, keepdim=True)[0]).div(temperature), dim=1)
    return (values.t() @ weights.t()).t().to(q.dtype), weights.to(q.dtype)


# kernel_regression


def _refuse_points(x, y, bandwidth):
    if tuple(x.shape) != tuple(y.shape) or x.numel() == 0:
        raise ValueError(f"x is {x.shape}, y is {y.shape}")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth {bandwidth}")


@alternative("kernel_regression")
def kernel_regression__as_a_soft_lookup(xq, x, y, bandwidth):
    _refuse_points(x, y, bandwidth)
    wide = torch.promote_types(xq.dtype, torch.float32)
    queries = torch.stack([xq.to(wide), torch.ones_like(xq, dtype=wide)], dim=1)
    keys = torch.stack([x.to(wide), -(x.to(wide) ** 2) / 2], dim=1)
    return soft_lookup(queries, keys, y.to(wide)[:, None], bandwidth**2)[0][:, 0].to(xq.dtype)


@alternative("kernel_regression")
def kernel_regression__logarithms(xq, x, y, bandwidth):
    _refuse_points(x, y, bandwidth)
    wide = torch.promote_types(xq.dtype, torch.float32)
    exponents = -((xq.to(wide).unsqueeze(1) - x.to(wide).unsqueeze(0)) ** 2) / (2 * bandwidth**2)
    weights = (exponents - torch.logsumexp(exponents, dim=1, keepdim=True)).exp()
    return (weights * y.to(wide)).sum(dim=1).to(xq.dtype)


# additive_scores


def _refuse_weights(q, k, w_q, w_k, v):
    if q.size(-1) != w_q.size(1):
        raise ValueError(f"q {q.shape}, weight {w_q.shape}")
    if k.size(-1) != w_k.size(1):
        raise ValueError(f"k {k.shape}, weight {w_k.shape}")
    if w_q.size(0) != v.size(0) or w_k.size(0) != v.size(0):
        raise ValueError(f"weights {w_q.shape} and {w_k.shape}, v {v.shape}")


@alternative("additive_scores")
def additive_scores__matmul(q, k, w_q, w_k, v):
    _refuse_weights(q, k, w_q, w_k, v)
    hidden = torch.matmul(q, w_q.t()).unsqueeze(-2) + torch.matmul(k, w_k.t()).unsqueeze(-3)
    return torch.matmul(torch.tanh(hidden), v.unsqueeze(-1)).squeeze(-1)


@alternative("additive_scores")
def additive_scores__einsum(q, k, w_q, w_k, v):
    _refuse_weights(q, k, w_q, w_k, v)
    of_keys = torch.einsum("ad,...nd->...na", w_k, k)
    of_queries = torch.einsum("ad,...qd->...qa", w_q, q)
    hidden = of_queries[..., None, :] + of_keys[..., None, :, :]
    return torch.einsum("...qna,a->...qn", hidden.tanh_(), v)


# attend


def _refuse_mask(scores, values, mask):
    if scores.size(-1) != values.size(-2):
        raise ValueError(f"scores {scores.shape}, values {values.shape}")
    if mask is None:
        return None
    try:
        return mask.expand_as(scores)
    except RuntimeError as error:
        raise ValueError(f"mask {mask.shape}, scores {scores.shape}") from error


@alternative("attend")
def attend__torch_softmax(scores, values, mask=None):
    mask = _refuse_mask(scores, values, mask)
    wide = torch.promote_types(scores.dtype, torch.float32)
    logits = scores.to(wide)
    if mask is None:
        weights = logits.softmax(dim=-1)
    else:
        logits = torch.where(mask, logits, torch.finfo(wide).min)
        weights = torch.where(mask, logits.softmax(dim=-1), 0)
    out = torch.einsum("...ij,...jc->...ic", weights, values.to(wide))
    return out.to(scores.dtype), weights.to(scores.dtype)


@alternative("attend")
def attend__divides_at_the_end(scores, values, mask=None):
    mask = _refuse_mask(scores, values, mask)
    half = scores.dtype in (torch.float16, torch.bfloat16)
    logits, mixed = (x.float() if half else x for x in (scores, values))
    if mask is not None:
        logits = logits.masked_fill(mask.logical_not(), -math.inf)
    if scores.size(-1) == 0:
        weights = logits
    else:
        top = logits.detach().amax(-1, keepdim=True)
        weights = (logits - torch.where(top == -math.inf, 0, top)).exp()
    total = weights.sum(-1, keepdim=True)
    total = torch.where(total > 0, total, 1)
    return (weights.matmul(mixed) / total).to(scores.dtype), (weights / total).to(scores.dtype)


# BahdanauAttention


@alternative("BahdanauAttention")
class BahdanauAttention__layers_of_torch(nn.Module):
    def __init__(self, d_query, d_enc, d_attn):
        super().__init__()
        self.q_proj = nn.Linear(d_query, d_attn, bias=False)
        self.k_proj = nn.Linear(d_enc, d_attn, bias=False)
        self.score_proj = nn.Linear(d_attn, 1, bias=False)

    def forward(self, query, enc, lengths):
        if query.size(0) != enc.size(0):
            raise ValueError(f"query {query.shape}, enc {enc.shape}")
        if lengths.size() != enc.size()[:1]:
            raise ValueError(f"lengths {lengths.shape}, enc {enc.shape}")
        if query.size(-1) != self.q_proj.in_features:
            raise ValueError(f"query {query.shape}, weight {self.q_proj.weight.shape}")
        if enc.size(-1) != self.k_proj.in_features:
            raise ValueError(f"enc {enc.shape}, weight {self.k_proj.weight.shape}")
        hidden = torch.tanh(self.q_proj(query).unsqueeze(1) + self.k_proj(enc))  # (B, T, A)
        scores = self.score_proj(hidden).squeeze(2)
        padding = torch.arange(enc.size(1), device=enc.device)[None] >= lengths[:, None]
        scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=1).masked_fill(padding, 0).type_as(enc)
        return torch.bmm(weights.unsqueeze(1), enc).squeeze(1), weights


# induction_lookup


@alternative("induction_lookup")
def induction_lookup__counts_pairs(tokens, n_vocab):
    T = tokens.numel()
    place = torch.arange(T, device=tokens.device)
    match = (tokens.unsqueeze(1) == tokens.unsqueeze(0)) & (place.unsqueeze(0) < place.unsqueeze(1))
    code = nn.functional.one_hot(tokens, n_vocab).float()
    counts = match.float()[:, : max(T - 1, 0)] @ code[1:]
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)


@alternative("induction_lookup")
def induction_lookup__the_start_is_a_token(tokens, n_vocab):
    T = len(tokens)
    code = torch.nn.functional.one_hot(torch.cat([tokens, tokens.new_tensor([n_vocab])]), n_vocab + 1).float()
    place = torch.eye(T + 1, device=tokens.device)
    before, _ = soft_lookup(place.roll(1, 0), place, code, 1e-2)  # the token n_vocab comes before the first
    future = torch.ones(T, T + 1, device=tokens.device).triu(1)
    future[:, T] = 0
    ask = torch.cat([code[:T], -2 * future, torch.full((T, 1), 0.6, device=tokens.device)], 1)
    has_nothing = torch.zeros(T + 1, 1, device=tokens.device)
    has_nothing[T] = 1
    before = before.masked_fill(has_nothing > 0, 0)
    values = code[:, :n_vocab]  # the last entry is no token, so its value is zeros
    return soft_lookup(ask, torch.cat([before, place, has_nothing], 1), values, 2e-3)[0]


# induction_head


@alternative("induction_head")
def induction_head__entry_by_entry(n_vocab, max_len):
    V, P = n_vocab, max_len
    width, inner = 3 * V + P, 3 * V + P
    layers = []
    for _ in range(2):
        layer = {f"{name}_proj.weight": torch.zeros(inner, width) for name in "qkv"}
        layer["o_proj.weight"] = torch.zeros(width, inner)
        layers.append(layer)
    first, second = layers
    for t in range(P):
        first["k_proj.weight"][t, V + t] = 30.0
        if t > 0:
            first["q_proj.weight"][t - 1, V + t] = 45.0
    for token in range(V):
        first["v_proj.weight"][P + token, token] = 2.0
        first["o_proj.weight"][V + P + token, P + token] = 0.5
        second["q_proj.weight"][token, token] = 45.0
        second["k_proj.weight"][token, V + P + token] = 40.0
        second["v_proj.weight"][token, token] = 1.0
        second["o_proj.weight"][2 * V + P + token, token] = 3.0
        second["q_proj.weight"][V, token] = -50.0
    second["k_proj.weight"][V, V] = 50.0
    return layers
