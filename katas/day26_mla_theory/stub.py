"""Day 26: the algebra of latent attention. `kata lesson` explains, `kata check` tells you where you are.

B batch, H heads, T queries, S keys, D model width, dn and dv the head widths of keys and values, r the width of
the latent c, dr the width of a rotated key that all heads share. Weights are (out, in). Every function keeps the
dtype of its tensors (float64 stays float64 all the way), accepts any strides, changes no input and draws no random
numbers. Shapes that do not fit raise ValueError with the shapes of both tensors in the message.
"""

from torch import Tensor


def cache_elements(
    kind: str,
    n_heads: int,
    head_dim: int,
    n_kv_heads: int | None = None,
    r: int | None = None,
    dr: int | None = None,
) -> int:
    """Return how many numbers one token leaves in the cache of one layer, as an int.

    "mha": a key and a value of width head_dim for each of the n_heads
    "gqa": a key and a value of width head_dim for each of the n_kv_heads
    "mla": one latent of width r and one rotated key of width dr (0 is allowed), for all heads together
    Arguments that a kind does not need are ignored. One that it needs and that is None raises ValueError, and so
    does any other kind.
    """
    raise NotImplementedError


def equivalent_gqa_groups(r: int, dr: int, head_dim: int) -> float:
    """Return how many key/value heads "gqa" would have with as many numbers in the cache as "mla": a float."""
    raise NotImplementedError


def compression_vs_mha(n_heads: int, head_dim: int, r: int, dr: int) -> float:
    """Return how many times more numbers "mha" caches than "mla" with the same heads."""
    raise NotImplementedError


def joint_low_rank(w_k: Tensor, w_v: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return w_down (r, D), w_uk (H*dn, r), w_uv (H*dv, r), the best approximation with one latent for both.

    w_k: (H*dn, D), w_v: (H*dv, D). The two products w_uk w_down and w_uv w_down come as near to w_k and w_v as
    any do: the sum of all squared differences, over both, is the least possible. Only the products count: which
    of the many factors with these products you return is yours.
    Exact when r is at least the rank of the two stacked. r < 1 and r > min(H*dn + H*dv, D) raise ValueError, and
    so do matrices of different D.
    Cost: nothing larger than the stacked matrix is made.
    """
    raise NotImplementedError


def absorbed_scores(q: Tensor, c: Tensor, w_uk: Tensor) -> Tensor:
    """Return the scores q k^T (B, H, T, S) of the keys k = w_uk c, without making a key.

    q: (B, H, T, dn), c: (B, S, r), w_uk: (H, dn, r). No scale is applied. T and S may be 0.
    Gradients flow to all three. Nothing broadcasts: B, H, dn and r have to agree, else ValueError.
    Cost: exactly 2*B*H*T*(dn*r + r*S) FLOPs, and no tensor that grows with H*S times dn or r: neither the keys of
    the heads nor a copy of the latent for each head.
    """
    raise NotImplementedError


def absorbed_values(p: Tensor, c: Tensor, w_uv: Tensor) -> Tensor:
    """Return p v (B, H, T, dv) for the values v = w_uv c, without making a value.

    p: (B, H, T, S), any numbers, used as they are; c: (B, S, r), w_uv: (H, dv, r). T and S may be 0.
    Gradients flow to all three. Nothing broadcasts: B, H, S and r have to agree, else ValueError.
    Cost: exactly 2*B*H*T*(S*r + r*dv) FLOPs, and no tensor that grows with H*S times dv or r.
    """
    raise NotImplementedError


def merge_query(w_q: Tensor, w_uk: Tensor) -> Tensor:
    """Return (H, r, D): the matrix of each head that takes x to what is multiplied with c to give the score.

    w_q: (H, dn, D), w_uk: (H, dn, r). For every x (D,) and c (r,), (merged x) . c = (w_q x) . (w_uk c).
    Other H or dn in the two: ValueError.
    """
    raise NotImplementedError


def merge_output(w_o: Tensor, w_uv: Tensor) -> Tensor:
    """Return (H, D, r): the matrix of each head that takes a mixture of latents to its share of the output.

    w_o: (D, H, dv), w_uv: (H, dv, r). For every c (r,), merged[h] c = w_o[:, h] (w_uv[h] c).
    Other H or dv in the two: ValueError.
    """
    raise NotImplementedError


def merged_parameter_ratio(d_model: int, dn: int, r: int) -> float:
    """Return how many times more numbers the merged (r, D) of a head has than w_q (dn, D) and w_uk (dn, r) together."""
    raise NotImplementedError


def effective_matrices(w_q: Tensor, w_uk: Tensor, positions: Tensor, query_pos: int) -> Tensor:
    """Return (P, D, r): for each key position s the matrix M_s with score = x^T M_s c, in the dtype of w_q.

    w_q: (dn, D), w_uk: (dn, r), one head. The query w_q x is rotated at the position query_pos, the key w_uk c
    at its position s out of positions (P,), whole numbers in any order; the score is their dot product, without
    a scale.
    Rotation at position s: the pair (x[2i], x[2i+1]) is turned by the angle s * 10000^(-2i/dn) to
    (x[2i] cos - x[2i+1] sin, x[2i] sin + x[2i+1] cos). Angles are computed in float64, so that a position of a
    million is as good as 1. P = 1 is fine.
    An odd dn raises ValueError, and so does another dn in w_q than in w_uk.
    """
    raise NotImplementedError


def latent_gauge(w_down: Tensor, w_uk: Tensor, w_uv: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (w_down, w_uk, w_uv) of the same keys and values whose latent is a c where it was c.

    w_down: (r, D), w_uk: (H*dn, r), w_uv: (H*dv, r), a: (r, r), which can be inverted and need be nothing else.
    An `a` of another shape raises ValueError.
    """
    raise NotImplementedError


def normalise_gauge(w_down: Tensor, w_uk: Tensor, w_uv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (w_down, w_uk, w_uv) of the same keys and values, with orthonormal rows in w_down.

    Shapes as in `latent_gauge`; r > D raises ValueError with the shape of w_down.
    """
    raise NotImplementedError


def calibrated_low_rank(w: Tensor, x_cal: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return down (r, D), up (O, r) so that the outputs x_cal w^T change as little as rank r permits.

    w: (O, D); x_cal: (N, D), one input per row, taken as they are (no mean is subtracted). The sum of squared
    differences between x_cal w^T and x_cal (up down)^T is the least possible, also when the inputs are fewer than
    D, or fill only a part of the space.
    r < 1 and r > min(O, D) raise ValueError, and so does another D in x_cal.
    Cost: nothing with N * N numbers is made.
    """
    raise NotImplementedError
