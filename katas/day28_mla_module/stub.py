"""Day 28: multi-head latent attention, complete. `kata lesson` explains, `kata check` tells you where you are.

B batch, H heads, T queries, S keys, D model width. dn is qk_nope_head_dim, dr is qk_rope_head_dim (even), dv is
v_head_dim, r is kv_lora_rank, rq is q_lora_rank. Masks are boolean, True means may attend. Results have the dtype of the
queries or of x; the softmax of half inputs is taken in float32, float64 stays float64. Nothing but a cache changes, and no
random number is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from day01_tensor_basics import merge_heads, split_heads
from day02_tensor_operations import broadcast_shape, masked_softmax
from day08_linear_layers import Linear, linear
from day14_custom_modules import RMSNorm
from day16_scaled_dot_product import causal_mask, combine_masks
from day19_positions import apply_rope, interleaved_to_half, rope_tables
from day26_mla_theory import absorbed_scores, absorbed_values
from day27_mla_components import LatentCache, decoupled_scores, split_kv_b
from torch import Tensor, nn


@dataclass(frozen=True)
class MLAConfig:
    """The sizes of one layer. Complete as it stands; an MLA has attributes of the same names."""

    d_model: int
    n_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int
    q_lora_rank: int | None = None


class Cost(NamedTuple):
    """What one call costs, for one sequence. Complete as it stands."""

    flops: int
    cache_bytes: int


def mla_cost(cfg: MLAConfig | MLA, t: int, s: int, mode: str, *, dtype_bytes: int = 2) -> Cost:
    """Return what it costs to run t new tokens of one sequence through a layer that then has s keys, these t included.

    cfg: an MLAConfig, or anything with attributes of these names. mode: "naive" or "absorbed".
    flops: 2 per multiply-add of all matrix products, as an int
      - both modes: the queries (one projection, or two through rq), the projection D -> r + dr, and o_proj, for t tokens
      - naive: kv_b_proj expands all s latents; scores over dn + dr; mixtures of values
      - absorbed: the content part of the queries goes to the latent space; scores over r + dr; mixtures of latents; the
        mixtures come out to dv
    cache_bytes: what the cache holds for s tokens, (r + dr) numbers of dtype_bytes each, in either mode
    t may be 0. A negative t and a t above s raise ValueError with both numbers, any other mode raises ValueError that
    names it.
    """
    raise NotImplementedError


def choose_mode(t: int, s: int, cfg: MLAConfig | MLA) -> str:
    """Return "naive" or "absorbed": the mode with fewer FLOPs for t new tokens among s keys.

    Counted as in `mla_cost`. Where both cost the same, "absorbed". t above s raises ValueError with both numbers.
    """
    raise NotImplementedError


def naive_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    c: Tensor,
    k_rope: Tensor,
    kv_b_weight: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return (B, H, T, dv): latents are expanded to the keys and values of every head, then attention as usual.

    q_nope: (B, H, T, dn), q_rope: (B, H, T, dr), rotated; c: (B, S, r); k_rope: (B, S, dr), rotated, one for all heads;
    kv_b_weight: (H*(dn+dv), r), for each head dn rows for keys and then dv rows for values (dv may be 0).
    The score of a query and a key is scale * (q_nope . k_nope + q_rope . k_rope); None means (dn + dr) ** -0.5.
    mask: broadcastable to (B, H, T, S), None allows everything; there is no other rule about who sees whom. A query that
    may see nothing gives zeros, and zeros as its gradients, never NaN. Gradients flow to all five inputs.
    Any strides are taken. Nothing else broadcasts: B, H, T, S, r and dr have to agree, and the rows of kv_b_weight have to
    be H*dn or more and a multiple of H, else ValueError with the shapes of the two that do not fit. The same for a mask
    that does not broadcast, with its shape and (B, H, T, S).
    Cost: exactly 2*B*(S*r*H*(dn+dv) + H*T*S*(dn+dr+dv)) FLOPs.
    """
    raise NotImplementedError


def absorbed_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    c: Tensor,
    k_rope: Tensor,
    kv_b_weight: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return what `naive_attention` returns, (B, H, T, dv), from attention to the latents themselves.

    Arguments, mask, scale (the default is that of the naive form), gradients and errors are those of `naive_attention`.
    Cost: exactly 2*B*(H*T*r*(dn+dv) + H*T*S*(2*r+dr)) FLOPs, and no tensor of more than B*H*T*(r+S) numbers is made:
    no keys, no values, and no copy of the latents or of kv_b_weight, in any dtype.
    """
    raise NotImplementedError


class MLA(nn.Module):
    """Causal multi-head latent attention of DeepSeek-V2 and V3.

    Parameters, all without bias, under the names of the published checkpoints:
      q_proj.weight (H*(dn+dr), D), or with a q_lora_rank: q_a_proj.weight (rq, D), q_a_layernorm.weight (rq,),
      q_b_proj.weight (H*(dn+dr), rq); for each head dn rows without position, then dr rotary ones
      kv_a_proj_with_mqa.weight (r+dr, D): the latent, then the rotary key; kv_a_layernorm.weight (r,), for the latent alone
      kv_b_proj.weight (H*(dn+dv), r); o_proj.weight (D, H*dv)
    The state dict holds these and nothing else. The seven sizes are kept as attributes of the same names, so that a layer
    serves as the cfg of `mla_cost`.

    eps goes to each RMSNorm. Rotations are those of day 19, for neighbors as pairs, with the frequencies base^(-2i/dr), or
    with inv_freq (dr/2,) in place of these; cosines and sines are multiplied by rope_scale, for queries and keys.
    softmax_scale replaces (dn + dr) ** -0.5. (YaRN passes in inv_freq, softmax_scale and rope_scale.)
    inv_freq keeps its precision when the layer is cast to another dtype. Angles of a float64 x are float64, all others
    float32, also for half layers.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        kv_lora_rank: int,
        q_lora_rank: int | None = None,
        base: float = 10000.0,
        softmax_scale: float | None = None,
        inv_freq: Tensor | None = None,
        eps: float = 1e-6,
        rope_scale: float = 1.0,
    ):
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        *,
        cache: LatentCache | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        mode: str = "auto",
    ) -> Tensor:
        """Map x (B, T, D) to (B, T, D), in the dtype of x.

        cache: without one, T tokens attend to themselves and S = T. With one, they come after the cache.length tokens
        that are in there, S = cache.length + T, and the cache is updated once, with the normalized latents (B, T, r) and
        the rotated keys (B, T, dr) of the new tokens. (A cache keeps no graph: run this under torch.no_grad().) Feeding a
        sequence in any parts, in any mixture of modes, gives what one call without a cache gives; so do other tokens after
        a `truncate`, and a new sequence after a `reset`.
        mask: broadcastable to (B, H, T, S), hides keys in addition to those of the future, which no mask can open. A token
        that may see nothing gives zeros.
        positions: (T,) or (B, T) integers for the rotations; None means cache.length, cache.length + 1, ... What is the
        future is decided by the order in the cache, not by positions. So rows of different lengths, padded on either
        side, come out as each alone, with positions of their own and a mask that hides the padding.
        mode: "naive", "absorbed", or "auto", which takes `choose_mode` for T and S.

        ValueError, before the cache changes: any other mode (named in the message), an x of another width, positions of
        another shape, a mask that does not broadcast to (B, H, T, S) (each with the shapes involved), and a batch that is
        not that of the cache.
        Cost: B times the FLOPs of `mla_cost`, exactly. A decoding step (T = 1, absorbed, no mask) in float32 writes at most
        12*B*H*(r+S) numbers, none of its tensors has more than B*H*(r+S), so neither latents nor weights are copied. No
        value is read on the host (the layer runs on the meta device, where there are none).
        """
        raise NotImplementedError


def deinterleave_rope(state: Mapping[str, Tensor], n_heads: int, dn: int, dr: int, r: int) -> dict[str, Tensor]:
    """Return the state dict for a kernel that pairs rotary columns i and i + dr/2, where `state` pairs 2i and 2i + 1.

    state: that of an MLA, of a whole model (names end in `.q_proj.weight` and so on, several layers at once), or a part.
    With the same frequency for the pair i, such a kernel gives the outputs that MLA gives with `state`.
    In q_proj.weight and q_b_proj.weight, the rotary rows of each of the n_heads heads of dn + dr rows, and in
    kv_a_proj_with_mqa.weight the dr rows after the first r, come in the order 0, 2, 4, ..., 1, 3, 5, ...; rows of any
    dtype. All other tensors are handed on as the same objects; names keep their order, and `state` stays as it is.
    A weight with another number of rows raises ValueError with its name, its shape and the number of rows that it should
    have; an odd dr raises ValueError.
    """
    raise NotImplementedError


def latent_flash_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: LatentCache,
    splits: int,
    *,
    scale: float,
    lengths: Tensor | None = None,
) -> Tensor:
    """Return mixtures of latents (B, H, T, r) for the newest T tokens, with the cache read in `splits` pieces.

    q_latent: (B, H, T, r), queries that are in the latent space already; q_rope: (B, H, T, dr). The keys are what the
    cache holds, those of the T tokens included; it is only read. Scores are scale * (q_latent . c + q_rope . k_rope); the
    mixture still has to be taken to dv, once, by the caller.
    lengths: integers (B,), how many keys each row has (0 <= length <= S); None: all S of the cache. Of the n keys of a row,
    query i sees the first n - T + 1 + i: the last query is the newest token. One that sees none gives zeros.
    Any splits from 1 on, also more than S; below 1 ValueError with the number. Pieces have ceil(S / splits) keys, the last
    one perhaps fewer.
    Scores of any size are fine. For half inputs sums and maxima are kept in float32; the result has the dtype of q_latent.
    Cost: exactly 2*B*H*T*S*(2*r+dr) FLOPs; in float32 at most 12*B*H*T*(r+n) numbers alive at once, in tensors of at most
    B*H*T*(r+n), for pieces of n keys: the same for every S. Runs on the meta device.
    """
    raise NotImplementedError
