"""Day 15: attention as soft lookup. `kata lesson` explains, `kata check` tells you where you are.

Q queries ask N entries of a memory. Each entry has a key, which is compared with the query, and a value, which is
what the entry has to say. D is the width of queries and keys, V that of the values.
"""

from __future__ import annotations

import torch
from day01_tensor_basics import sequence_mask  # noqa: F401 - yours, if you passed these days
from day02_tensor_operations import masked_softmax, softmax  # noqa: F401
from day08_linear_layers import Linear, linear  # noqa: F401
from torch import Tensor, nn


def hard_lookup(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return (Q, V): for each query, the value whose key has the largest dot product with it.

    q: (Q, D), keys: (N, D), values: (N, V). Q may be 0, N may be 1.
    If several keys are equally good, the first of them answers.
    Values may be of any dtype, integers as well: they are copied, bit by bit, and the values of other entries
    (inf and NaN included) leave no trace. The result never shares memory with `values`.
    Dot products of float16 and bfloat16 are computed in float32, so that 256 and 257 stay apart.
    Gradients: a value gets what arrives at the answers that are its copies. q and keys get none.
    Raises ValueError, with both shapes, when q and keys differ in D and when keys and values differ in N; with the
    shape of keys when N is 0.
    """
    raise NotImplementedError


def soft_lookup(q: Tensor, keys: Tensor, values: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return (out, weights): weights = softmax of (q . key) / temperature over the keys, out = weights values.

    Returns out (Q, V) and weights (Q, N).
    q: (Q, D), keys: (N, D), values: (N, V), all float and of one dtype, which is that of both results. Q may be 0.
    Each query has a weight of 1 to give away. The scores are plain dot products: nothing is normalized, and
    nothing but the temperature divides them. Scores of 10,000 and more are fine.
    temperature: any number above 0. The smaller, the closer to `hard_lookup`, except that equally good keys
        share the weight; this holds down to 1e-37, also where score / temperature is infinite. With math.inf the
        result is the plain mean. 0, negative numbers and NaN raise ValueError with the number in the message.
    float16 and bfloat16 are computed in float32 and rounded at the end; float64 stays float64.
    Gradients flow to q, keys and values.
    Raises ValueError about shapes as `hard_lookup` does, also when N is 0.
    Cost: exactly two matrix products, of 2*Q*N*(D + V) FLOPs together.
    """
    raise NotImplementedError


def kernel_regression(xq: Tensor, x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    """Return (Q,): at each place of xq, the mean of y weighted by exp(-(xq - x)^2 / (2 bandwidth^2)).

    xq: (Q,), x: (N,), y: (N,), all float and of one dtype, which is that of the result. Q may be 0.
    The weights of one query sum to 1, so constant y come back as they are (to rounding). Far away from all data, at
    1,000 bandwidths and more, where every exponential is 0 as a float, the nearest points still decide.
    bandwidth: any number above 0; 0, negative numbers and NaN raise ValueError with the number in the message.
    float16 and bfloat16 are computed in float32 and rounded at the end; float64 stays float64.
    Gradients flow to xq, x and y.
    Raises ValueError with both shapes when x and y differ, and with the shape of x when N is 0.
    """
    raise NotImplementedError


def additive_scores(q: Tensor, k: Tensor, w_q: Tensor, w_k: Tensor, v: Tensor) -> Tensor:
    """Return the scores (..., Q, N) = v . tanh(w_q q + w_k k), for each query with each key.

    q: (..., Q, Dq), k: (..., N, Dk), w_q: (A, Dq), w_k: (A, Dk), v: (A,). Dq and Dk may differ, the leading axes
    broadcast, Q and N may be 0. All are float and of one dtype, which is that of the result.
    Gradients flow to all five.
    Raises ValueError with both shapes when q does not fit w_q, when k does not fit w_k (in the last axes), and when
    w_q or w_k has not as many rows as v has numbers.
    Cost: each query and each key is multiplied by its matrix once, not once per pair: for each entry of the leading
    axes, 2*A*(Q*Dq + N*Dk + Q*N) FLOPs of products at most. Without gradients, new tensors hold no more than
    2*Q*N*A numbers, beside a few of the sizes Q*N, Q*A and N*A. No loops.
    """
    raise NotImplementedError


def attend(scores: Tensor, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (out, weights): weights = softmax of the scores over the allowed keys, out = weights values.

    scores: (..., Q, N), values: (..., N, V), of one dtype, which is that of both results; leading axes broadcast
    mask: boolean, broadcastable to the scores, True = may attend; None = every key
    Returns out (..., Q, V) and weights (..., Q, N).

    The weights of one query sum to 1, those of hidden keys are exactly 0, and what (finite) numbers a hidden score
    or its value holds changes nothing. An allowed key counts however low its score is. Scores of 10,000 and more are
    fine.
    A query that may attend to no key, also because N = 0, gets zeros in out and weights, and sends back zero
    gradients, never NaN. Q and leading axes may be 0, too.
    float16 and bfloat16 are computed in float32 and rounded once at the end; float64 stays float64.
    Gradients flow to scores and values.
    Raises ValueError with both shapes when scores and values differ in N, and when the mask does not broadcast to
    the scores (it may not enlarge them).
    """
    raise NotImplementedError


class BahdanauAttention(nn.Module):
    """Additive attention of a decoder state to the states of an encoder.

    Three layers without bias, and no other parameters:
        q_proj  d_query -> d_attn     k_proj  d_enc -> d_attn     score_proj  d_attn -> 1
    The score of a place is score_proj(tanh(q_proj(query) + k_proj(state))).
    """

    def __init__(self, d_query: int, d_enc: int, d_attn: int):
        raise NotImplementedError

    def forward(self, query: Tensor, enc: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return (context, weights): context (B, De) is the mixture of the states by weights (B, T).

        query: (B, Dq), enc: (B, T, De). B and T may be 0.
        lengths: integers (B,), at most T. Row b of enc holds lengths[b] states. What comes after them is padding: its
            weights are exactly 0, its (finite) content changes nothing, and its gradient is 0. How much padding
            there is changes nothing either. A row of length 0 gets zeros, and no gradient is ever NaN.
        The weights of a row that is not empty sum to 1. The context is made of the states themselves, not of their
        projections. Results have the dtype of the inputs, which is that of the parameters. Inputs are not changed.
        Gradients flow to query, enc and all parameters. No loops.
        Raises ValueError with both shapes when query and enc differ in B (a batch of 1 is not stretched), and when
        lengths is not (B,) (the shapes of lengths and enc). When query or enc does not fit its layer, ValueError
        with the shape of the layer's weight.
        """
        raise NotImplementedError


def induction_lookup(tokens: Tensor, n_vocab: int) -> Tensor:
    """Return (T, n_vocab): for each place, what followed the earlier occurrences of the token that stands there.

    tokens: int64 (T,), from 0 to n_vocab - 1. T may be 0.
    Row t looks at all places s < t with tokens[s] == tokens[t]. The tokens tokens[s + 1] that followed share a
    weight of 1 equally, so after "A B ... A" the row is the one-hot code of B, and after "A B A C A" it is half B and
    half C. "A A" counts: the second A followed the first. If there is no earlier occurrence, the row is all zeros.
    Nothing after place t has any influence on row t.
    float32, on the device of tokens, to 1e-6. Nothing is trained and nothing is random: two calls of `soft_lookup` with
    one-hot codes suffice. No loops.
    """
    raise NotImplementedError


def induction_head(n_vocab: int, max_len: int) -> list[dict[str, Tensor]]:
    """Return the weights of two attention layers that do what `induction_lookup` does: two dicts, float32, on the CPU.

    The stream that passes the layers has D = 3*n_vocab + max_len features per place, in four blocks:
        token   n_vocab   at first, the one-hot code of the token
        place   max_len   at first, the one-hot code of its place, counted from 0
        before  n_vocab   at first zeros
        guess   n_vocab   at first zeros
    Each dict has "q_proj.weight", "k_proj.weight" and "v_proj.weight" (Dh, D) and "o_proj.weight" (D, Dh), with any Dh.
    They are those of day 17's SelfAttention. Both layers run like this, x (T, D) with T <= max_len:
        scores = q_proj(x) k_proj(x)^T / sqrt(Dh), and each place sees itself and the places before it
        x <- x + o_proj(softmax(scores) v_proj(x))

    After the first layer, `before` holds the one-hot code of the token one place earlier, to 1e-3; at place 0 it may be
    anything. After both, at each place whose token occurred earlier, the largest number of `guess` stands at a
    token that followed such an earlier occurrence, and exceeds those of all tokens that did not by 1e-3 at least.
    No weight is larger than 50 or smaller than -50. This holds for every sequence of at most max_len tokens, for
    n_vocab up to 64 and max_len up to 64; both may be 1.
    """
    raise NotImplementedError
