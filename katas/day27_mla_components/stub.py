"""Day 27: the pieces of latent attention. `kata lesson` explains, `kata check` tells you where you are.

B batch, H heads, T new tokens, S or L all tokens so far, D model width (d_model), dn and dv the head widths of keys and
values, dr the width of the rotary part (even), r the width of the latent, rq that of the queries' latent.

Layouts and names are those of DeepSeek's checkpoints. Projections have a weight (out, in) and no bias; norms are RMSNorms
with a gain `weight` that begins as ones. Modules have exactly the parameters that are listed; how the matrices are drawn
is yours. Results have the dtype of the input, float64 stays float64, and the statistics of a norm over half-precision
numbers are taken in float32. Strides are arbitrary, no input is changed, and shapes that do not fit raise ValueError with
the shapes of both tensors in the message.

RoPE turns neighboring pairs: (x[2i], x[2i+1]) becomes (x[2i] cos_i - x[2i+1] sin_i, x[2i] sin_i + x[2i+1] cos_i), as in
day 19's apply_rope. The tables cos and sin, (T, dr/2) or (B, T, dr/2) for a position of its own in each row, are used as
they are; tables of another T or dr raise ValueError with their shape in the message.
"""

import torch
from torch import Tensor, nn


def mla_parameter_count(
    d_model: int, n_heads: int, dn: int, dr: int, dv: int, r: int, rq: int | None = None
) -> dict[str, int]:
    """Return how many parameters each part of one attention layer has, and their sum under "total".

    rq None: "q_proj", from d_model to H*(dn+dr). Otherwise "q_a_proj", from d_model to rq, "q_a_layernorm" with rq gains,
    and "q_b_proj", from rq to H*(dn+dr).
    In both cases "kv_a_proj_with_mqa", from d_model to r+dr, "kv_a_layernorm" with r gains, "kv_b_proj", from r to
    H*(dn+dv), and "o_proj", from H*dv to d_model. The dict has these keys and no others. Nothing has a bias.
    """
    raise NotImplementedError


class KVDown(nn.Module):
    """From x to what is cached of it.

    Parameters: kv_a_proj_with_mqa.weight (r+dr, D), whose first r rows make the latent and whose last dr the key, and
    kv_a_layernorm.weight (r,).
    """

    def __init__(self, d_model: int, r: int, dr: int, eps: float = 1e-6):
        raise NotImplementedError

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return c (B, T, r), the normalized latent, and k_rope (B, T, dr), the rotated key of all heads, for x (B, T, D).

        The norm sees the latent alone, the rotation the key alone: c does not depend on positions, and k_rope grows with x.
        eps is added to the mean square, under the root.
        Cost: one matrix product of 2*B*T*D*(r+dr) FLOPs.
        """
        raise NotImplementedError


def split_kv_b(weight: Tensor, n_heads: int, dn: int, dv: int) -> tuple[Tensor, Tensor]:
    """Return w_uk (H, dn, r) and w_uv (H, dv, r), two views of kv_b_proj.weight (H*(dn+dv), r).

    The rows come head by head: dn for the head's key, then dv for its value. The views share memory with the weight, so
    that whoever changes it changes them, and gradients flow through them.
    Another number of rows than H*(dn+dv) raises ValueError with the shape of the weight and the number that was expected.
    Cost: nothing is computed and nothing is copied.
    """
    raise NotImplementedError


class KVUp(nn.Module):
    """From the latent to the keys, without their rotary part, and the values of all heads.

    Parameter: kv_b_proj.weight (H*(dn+dv), r), laid out as in `split_kv_b`.
    """

    def __init__(self, r: int, n_heads: int, dn: int, dv: int):
        raise NotImplementedError

    def forward(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return k_nope (B, H, S, dn) and v (B, H, S, dv) for c (B, S, r), which is normalized already.

        Cost: one matrix product of 2*B*S*r*H*(dn+dv) FLOPs.
        """
        raise NotImplementedError


class QueryPath(nn.Module):
    """From x to the queries: straight where rq is None, else through a normalized latent c_q of width rq.

    Parameters: q_proj.weight (H*(dn+dr), D); or q_a_proj.weight (rq, D), q_a_layernorm.weight (rq,) and
    q_b_proj.weight (H*(dn+dr), rq). The rows of the last matrix come head by head: dn without position, then dr to be
    rotated.
    """

    def __init__(self, d_model: int, n_heads: int, dn: int, dr: int, rq: int | None = None, eps: float = 1e-6):
        raise NotImplementedError

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return q_nope (B, H, T, dn) and the rotated q_rope (B, H, T, dr) for x (B, T, D).

        With a latent both parts come from the normalized c_q. No scale is applied.
        Cost: one matrix product of 2*B*T*D*H*(dn+dr) FLOPs, or two of 2*B*T*rq*(D + H*(dn+dr)) together.
        """
        raise NotImplementedError


def decoupled_scores(
    q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, scale: float | None = None
) -> Tensor:
    """Return (B, H, T, S): (q_nope . k_nope + q_rope . k_rope) * scale, without softmax or mask, in the dtype of the inputs.

    q_nope: (B, H, T, dn), q_rope: (B, H, T, dr), k_nope: (B, H, S, dn), k_rope: (B, S, dr), the same for all heads.
    scale None means (dn + dr)**-0.5; any other number is used as it is. T and S may be 0. Gradients flow to all four.
    Nothing broadcasts but k_rope: B, H, T, S, dn and dr have to agree, else ValueError; a k_rope with a head axis is refused.
    Cost, for contiguous inputs (k_rope may be a slice of a larger buffer): 2*B*H*T*S*(dn+dr) FLOPs, and new tensors of no
    more numbers together than two tables of scores and the queries have. k_rope is not copied for the heads.
    """
    raise NotImplementedError


class LatentCache:
    """Latents and rotated keys of up to max_len positions, in memory that is allocated once.

    `length` is the number of valid positions (0 at first), `max_len` the limit, `nbytes` (an attribute or a property) the
    bytes of the memory: batch * max_len * (r+dr) numbers of `dtype`, whatever the length and the number of heads.
    """

    def __init__(
        self,
        batch: int,
        max_len: int,
        r: int,
        dr: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        raise NotImplementedError

    def update(self, c: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Store c (B, T, r) and k_rope (B, T, dr), as they are, after what is there; return what is valid now.

        Returns C (B, L, r) and K (B, L, dr), oldest first, L the new length: views of the cache's own memory, in its dtype.
        T may be 0. The numbers are copied: who changes c later does not change the cache.
        ValueError, with both shapes, if B, r or dr do not fit or the two differ in T; ValueError if there is no room, with
        T, the length and max_len in the message; RuntimeError if gradients are enabled and c or k_rope requires them, as a
        cache keeps no graph. Whenever it raises, the cache stays as it was.
        Cost: no new memory.
        """
        raise NotImplementedError

    def truncate(self, n: int) -> None:
        """Forget all but the first n positions; ValueError unless 0 <= n <= length."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything."""
        raise NotImplementedError


def fold_norm(kv_a_layernorm_weight: Tensor, kv_b_weight: Tensor) -> Tensor:
    """Return a weight (O, r) that gives, for a latent normalized with gains of 1, what kv_b_weight gives with these gains.

    kv_a_layernorm_weight: (r,), any numbers, kv_b_weight: (O, r). Another r raises ValueError. Gradients flow to both.
    """
    raise NotImplementedError


def norm_counterexample(c: Tensor) -> Tensor:
    """Return a second latent (r,), so that no matrix (r, r) normalizes both it and c.

    c: (r,), not zero. To normalize is to divide by the root of the mean square, here without eps and gains. Whatever the
    matrix, its two results, seen as one vector of 2r numbers, must miss the two normalized latents by a tenth of their
    length or more. The result is finite and has the dtype of c.
    """
    raise NotImplementedError


def quantize_latent(c: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    """Return codes (..., r) in int8 and scales (..., r/group) in float32 with c close to codes * scales.

    c: (..., r), of any floating dtype. Each run of `group` neighbors has one scale, a 127th of its largest magnitude, and
    each code is the nearest whole number, from -127 to 127: no number is off by more than half a scale (and the rounding
    of float32). A group of zeros has the scale 0 and the codes 0. An r without whole groups raises ValueError with the
    shape of c.
    """
    raise NotImplementedError


class QuantizedLatentCache:
    """A cache with the protocol of `LatentCache` that keeps codes, scales, and rotated keys in bfloat16.

    `bytes_per_token` is what one position of one row takes, `nbytes` what all of them do; `length` and `max_len` as ever.
    An r without whole groups raises ValueError.
    """

    def __init__(
        self,
        batch: int,
        max_len: int,
        r: int,
        dr: int,
        *,
        group: int = 128,
        device: torch.device | str | None = None,
    ):
        raise NotImplementedError

    def update(self, c: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store c (B, T, r), quantized, and k_rope (B, T, dr); return codes (B, L, r), scales (B, L, r/group), keys (B, L, dr).

        The three are views of the cache's own memory. What does not fit raises as in `LatentCache.update`, and the cache
        stays as it was. Cost: no memory that grows with what is cached already.
        """
        raise NotImplementedError

    def truncate(self, n: int) -> None:
        """Forget all but the first n positions; ValueError unless 0 <= n <= length."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything."""
        raise NotImplementedError


def quantized_scores(q_latent: Tensor, codes: Tensor, scales: Tensor, block: int = 64) -> Tensor:
    """Return (B, H, T, S): the products of q_latent (B, H, T, r) with the latents of codes (B, S, r) and scales (B, S, G).

    q_latent is a query that day 26's absorption has taken to the latent space. The work is done in float32 at least, the
    result has the dtype of q_latent. S may be 0 and need not be a multiple of block. Gradients flow to q_latent. Another B
    or r in the codes than in q_latent, and another B or S in the scales, raises ValueError with both shapes.
    Cost: at most `block` positions are turned back into floating point at a time; no new tensor has more than the larger
    of B*block*r and B*H*T*S numbers.
    """
    raise NotImplementedError


def score_error_bound(q_latent: Tensor, scales: Tensor) -> Tensor:
    """Return (B, H, T, S): the largest error that quantizing may bring to each score.

    q_latent: (B, H, T, r), scales: (B, S, G). A number of group g may be off by scales[..., g] / 2, in either direction: the
    bound is reached when all of them are, and each in the direction that hurts. Computed and returned in float32, or in
    float64 for such a q_latent. Another B, or a G that does not divide r, raises ValueError with both shapes.
    """
    raise NotImplementedError
