"""Attention as a dictionary that answers by similarity: scores, weights, and a mixture of the values.

Hard and soft lookup; the kernel regression of Nadaraya and Watson (both 1964), which is a soft lookup with another
score; and the attention of Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and
Translate" (arXiv 1409.0473), section 3.1 and appendix A.1.2. The last two functions put two lookups in a row: what
Olsson et al., "In-context Learning and Induction Heads" (arXiv 2209.11895), found in trained models, here set by hand.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference.day01_tensor_basics import sequence_mask
from reference.day02_tensor_operations import masked_softmax, softmax
from reference.day08_linear_layers import Linear, linear

COLD = 1e-3  # a temperature at which a score that is lower by a half weighs exp(-500), nothing
LIMIT = 50.0  # the largest weight in `induction_head`


def hard_lookup(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return, for each query, a copy of the value whose key has the largest dot product with it."""
    _check_memory(q, keys, values)
    scores = _at_least_float32(q) @ _at_least_float32(keys).T  # (Q, N)
    return values[scores.argmax(dim=1)]  # (Q, V)


def soft_lookup(q: Tensor, keys: Tensor, values: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return (out, weights): each query's mixture of the values, and the weights of the mixture."""
    _check_memory(q, keys, values)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, but it has to be above 0")
    scores = _at_least_float32(q) @ _at_least_float32(keys).T  # (Q, N)
    behind = scores - scores.amax(dim=1, keepdim=True)  # 0 for the best: dividing it cannot overflow
    weights = softmax(behind / temperature)  # (Q, N)
    out = weights @ _at_least_float32(values)  # (Q, V)
    return out.to(q.dtype), weights.to(q.dtype)


def kernel_regression(xq: Tensor, x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    """Return the mean of y at each query, weighted by a Gaussian of the distance to x."""
    if x.shape != y.shape:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} are not pairs")
    if not x.numel():
        raise ValueError(f"x {tuple(x.shape)} holds no point to learn from")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth is {bandwidth}, but it has to be above 0")
    xq_wide, x_wide, y_wide = (_at_least_float32(t) for t in (xq, x, y))
    distance = (xq_wide[:, None] - x_wide) / bandwidth  # (Q, N)
    weights = softmax(-distance.square() / 2)  # (Q, N)
    return (weights @ y_wide).to(xq.dtype)  # (Q,)


def additive_scores(q: Tensor, k: Tensor, w_q: Tensor, w_k: Tensor, v: Tensor) -> Tensor:
    """Return v . tanh(w_q q + w_k k) for each query and key."""
    if w_q.shape[:1] != v.shape:
        raise ValueError(f"v {tuple(v.shape)} has not one number per row of w_q {tuple(w_q.shape)}")
    if w_k.shape[:1] != v.shape:
        raise ValueError(f"v {tuple(v.shape)} has not one number per row of w_k {tuple(w_k.shape)}")
    hidden = linear(q, w_q)[..., :, None, :] + linear(k, w_k)[..., None, :, :]  # (..., Q, N, A)
    return hidden.tanh() @ v  # (..., Q, N)


def attend(scores: Tensor, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (out, weights): softmax of the allowed scores, and the values mixed by it."""
    if scores.shape[-1] != values.shape[-2]:
        raise ValueError(f"scores {tuple(scores.shape)} and values {tuple(values.shape)} differ in the number of keys")
    weights = masked_softmax(_at_least_float32(scores), mask)  # (..., Q, N)
    out = weights @ _at_least_float32(values)  # (..., Q, V)
    return out.to(scores.dtype), weights.to(scores.dtype)


class BahdanauAttention(nn.Module):
    """Additive attention of one decoder state to the encoder states of a padded batch."""

    def __init__(self, d_query: int, d_enc: int, d_attn: int):
        super().__init__()
        self.q_proj = Linear(d_query, d_attn, bias=False)
        self.k_proj = Linear(d_enc, d_attn, bias=False)
        self.score_proj = Linear(d_attn, 1, bias=False)

    def forward(self, query: Tensor, enc: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return (context (B, De), weights (B, T)) of query (B, Dq) and enc (B, T, De)."""
        B, T, _ = enc.shape
        if len(query) != B:
            raise ValueError(f"query {tuple(query.shape)} and enc {tuple(enc.shape)} differ in their batch")
        if lengths.shape != (B,):
            raise ValueError(f"lengths {tuple(lengths.shape)} are not one per row of enc {tuple(enc.shape)}")
        w_q, w_k, v = self.q_proj.weight, self.k_proj.weight, self.score_proj.weight[0]
        scores = additive_scores(query[:, None], enc, w_q, w_k, v)  # (B, 1, T)
        mask = sequence_mask(lengths, T)[:, None]  # (B, 1, T)
        context, weights = attend(scores, enc, mask)  # (B, 1, De), (B, 1, T)
        return context[:, 0], weights[:, 0]


def induction_lookup(tokens: Tensor, n_vocab: int) -> Tensor:
    """Return what followed the earlier occurrences of each token, (T, n_vocab), by two soft lookups.

    The memory has T + 1 entries: entry 0 holds nothing, entry j + 1 holds token j.
    """
    T = len(tokens)
    entry = torch.eye(T + 1, device=tokens.device)  # (T + 1, T + 1)
    nothing = entry.new_zeros(1, n_vocab)
    token = F.one_hot(tokens, n_vocab)  # (T, V)
    memory = torch.cat([nothing, token])  # (T + 1, V)
    before, _ = soft_lookup(entry[:-1], entry, memory, COLD)  # (T, V): the token before each place

    # Place t asks for a place that comes after its own token: 1 point, less 1 if that place is in the future.
    # Entry 0 has half a point, so it wins when nobody else answers.
    keys = torch.cat([torch.cat([nothing, before]), entry], dim=1)  # (T + 1, V + T + 1)
    wishes = entry.new_full((T, T + 1), -1.0).triu(2)
    wishes[:, 0] = 0.5
    out, _ = soft_lookup(torch.cat([token, wishes], dim=1), keys, memory, COLD)
    return out  # (T, V)


def induction_head(n_vocab: int, max_len: int) -> list[dict[str, Tensor]]:
    """Return the weights of two attention layers that complete repeated pairs of tokens."""
    V, P = n_vocab, max_len
    width = max(V, P)
    token, place, before, guess = torch.eye(3 * V + P).split([V, P, V, V])  # rows that read their part of a feature
    start = place[:1]  # reads whether this is place 0
    previous = {
        "q_proj": F.pad(LIMIT * place[1:], (0, 0, 0, width - P + 1)),  # place t asks for place t - 1,
        "k_proj": F.pad(LIMIT * place, (0, 0, 0, width - P)),  # each place says where it is,
        "v_proj": F.pad(token, (0, 0, 0, width - V)),  # and hands over its token
        "o_proj": F.pad(before, (0, 0, 0, width - V)).T,
    }
    complete = {
        "q_proj": F.pad(LIMIT * token, (0, 0, 0, width - V)),  # "who comes after my token?"
        "k_proj": F.pad(LIMIT * (before - start), (0, 0, 0, width - V)),  # place 0 comes after nobody
        "v_proj": F.pad(token, (0, 0, 0, width - V)),
        "o_proj": F.pad(guess, (0, 0, 0, width - V)).T,
    }
    return [{f"{name}.weight": weight for name, weight in layer.items()} for layer in (previous, complete)]


def _check_memory(q: Tensor, keys: Tensor, values: Tensor) -> None:
    """Raise ValueError if there is nothing to look up, or the shapes do not fit."""
    if q.shape[1] != keys.shape[1]:
        raise ValueError(f"q {tuple(q.shape)} and keys {tuple(keys.shape)} differ in their width")
    if len(keys) != len(values):
        raise ValueError(f"keys {tuple(keys.shape)} and values {tuple(values.shape)} differ in number")
    if not len(keys):
        raise ValueError(f"keys {tuple(keys.shape)}: there is nothing to look up")


def _at_least_float32(x: Tensor) -> Tensor:
    """Return half inputs in float32 and everything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
