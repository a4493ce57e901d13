"""Day 29: a DeepSeek model before its weights. `kata lesson` explains, `kata check` tells you where you are.

Only `yarn_inv_freq` and `rope_setup` make a tensor. Everything else counts, with ints, and makes none.

Where a function takes a `cfg`, it reads the fields of `DeepSeekConfig` by their names and uses nothing else of it:
the checks hand in records of their own. What a model has no use for (kv_lora_rank without latent attention) is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from day16_scaled_dot_product import attention_flops  # noqa: F401 - yours, if you passed day 16
from torch import Tensor


class LayerKind(NamedTuple):
    """What a layer is made of. Nothing to do here."""

    mlp: str  # "dense" or "moe"
    attention: str  # "mla" or "mha"


def layer_plan(cfg: DeepSeekConfig) -> list[LayerKind]:
    """Return the kind of each of the num_hidden_layers layers, from the first to the last.

    The first first_k_dense_replace layers are "dense", all others "moe"; without experts (n_routed_experts is
    None) all are "dense". Attention is "mla" in every layer where kv_lora_rank is a number, else "mha".
    """
    raise NotImplementedError


def kv_cache_bytes(cfg: DeepSeekConfig, batch: int, length: int, dtype_bytes: int = 2) -> int:
    """Return the bytes of the cache of all layers, for `batch` sequences of `length` tokens.

    Latent attention keeps, per token and layer, one latent of width kv_lora_rank and one rotated key of width
    qk_rope_head_dim, whatever the number of heads. Ordinary attention keeps a key and a value, each of width
    hidden_size / num_attention_heads, for each of the num_key_value_heads. Each number takes dtype_bytes.
    """
    raise NotImplementedError


@dataclass(frozen=True)
class DeepSeekConfig:
    """The sizes and switches of a model, under the names of config.json. Fields and defaults are final.

    Making one, by any of the ways below or directly, fills two fields that are None:
    num_key_value_heads becomes num_attention_heads, original_max_position_embeddings becomes
    max_position_embeddings. And it raises ValueError, with the names and the values in the message, when
      - kv_lora_rank is a number, and qk_nope_head_dim, qk_rope_head_dim or v_head_dim is None
      - kv_lora_rank is a number, and qk_rope_head_dim is odd
      - kv_lora_rank is None, and hidden_size is no multiple of num_attention_heads, or this is no multiple of
        num_key_value_heads, or hidden_size / num_attention_heads is odd
      - n_routed_experts is a number, and num_experts_per_tok or moe_intermediate_size is None
      - n_routed_experts is a number, and no multiple of n_group, or topk_group is more than n_group, or
        num_experts_per_tok is more than the experts in topk_group groups
      - scoring_func is neither "softmax" nor "sigmoid"
      - topk_method is none of "greedy", "group_limited_greedy", "noaux_tc"
      - rope_type is neither "default" nor "yarn"
    A field that is missing needs no value in the message, only its name. All else is taken as it comes.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of a dense layer
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    # latent attention, where kv_lora_rank is a number
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None  # None: queries are not compressed
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    # experts, where n_routed_experts is a number
    n_routed_experts: int | None = None
    n_shared_experts: int = 0
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None  # of one expert
    first_k_dense_replace: int = 0
    n_group: int = 1
    topk_group: int = 1
    topk_method: str = "greedy"
    scoring_func: str = "softmax"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    # the rest
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0
    # positions
    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self):
        """Fill what follows from other fields, and refuse what cannot be built."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> DeepSeekConfig:
        """Read the dict of a config.json.

        Keys that are no field are ignored. A key whose value is None counts as missing, and a missing one gets
        the default of its field; vocab_size, hidden_size, intermediate_size, num_hidden_layers and
        num_attention_heads have none: ValueError with the name. Where d["model_type"] is "deepseek_v3", three
        defaults are others: scoring_func "sigmoid", topk_method "noaux_tc", norm_topk_prob True.
        The eight fields of positions (rope_theta to mscale_all_dim) stand in a dict of their own, under
        "rope_parameters" (new) or "rope_scaling" (old; may be None); in the old form rope_theta stands outside
        of it. rope_type may be called "type". What stands inside counts before what stands outside, the name
        rope_type before the name type.
        d and what is in it stay as they are.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return a new dict that `from_dict` reads back as an equal config, and that json can write.

        It has every field under its name, those of positions inside "rope_parameters" and not outside.
        """
        raise NotImplementedError

    @classmethod
    def v2_lite(cls) -> DeepSeekConfig:
        """Return DeepSeek-V2-Lite, with the sizes of the lesson's table."""
        raise NotImplementedError

    @classmethod
    def v2(cls) -> DeepSeekConfig:
        """Return DeepSeek-V2, with the sizes of the lesson's table."""
        raise NotImplementedError

    @classmethod
    def v3(cls) -> DeepSeekConfig:
        """Return DeepSeek-V3, with the sizes of the lesson's table."""
        raise NotImplementedError

    @classmethod
    def deepseek_math_7b(cls) -> DeepSeekConfig:
        """Return DeepSeekMath-7B, with the sizes of the lesson's table: dense, with ordinary attention."""
        raise NotImplementedError

    @classmethod
    def tiny(cls, style: str) -> DeepSeekConfig:
        """Return a model that runs in milliseconds, in the style "v2" or "v3"; any other style raises ValueError.

        Both: vocabulary 97, width 64, dense layers 96 wide, three layers of which the first is dense, 4 heads of
        16 + 8 (nope, rope) and 12 for values, latent 32, 8 routed experts in 4 groups, 3 per token out of 2
        groups, each 24 wide; YaRN of factor 40 for a context of 64, so max_position_embeddings is 2560.
        "v2": plain queries, 2 shared experts, group_limited_greedy, routed_scaling_factor 16.0, both mscales
        0.707. "v3": queries compressed to 24, 1 shared expert, the router of V3, routed_scaling_factor 2.5, both
        mscales 1.0.
        """
        raise NotImplementedError


def count_parameters(cfg: DeepSeekConfig) -> dict[str, int]:
    """Return how many numbers the parts of the model have. No bias anywhere but in "buffers".

    "embedding": one row of hidden_size per token of the vocabulary
    "attention": all layers. Latent attention: the query from hidden_size to all heads of qk_nope_head_dim +
        qk_rope_head_dim, directly or, where q_lora_rank is a number, down to it, a norm of that width, and up;
        the latent and one rotated key from hidden_size; a norm of the latent (not of the key); keys of
        qk_nope_head_dim and values of v_head_dim for all heads from the latent; from the values of all heads
        back to hidden_size. Ordinary attention: query, key, value and output, with heads of hidden_size /
        num_attention_heads and only num_key_value_heads of them for key and value.
    "dense_mlp": gate, up and down of intermediate_size in each dense layer
    "routed_experts", "shared_experts": gate, up and down of moe_intermediate_size for each expert of its kind
        in each layer with experts
    "router": a row of hidden_size per routed expert in each layer with experts
    "norms": two per layer and one at the end, of hidden_size
    "head": as the embedding, or 0 where tie_word_embeddings makes it the same table
    "buffers": with topk_method "noaux_tc" one number per routed expert in each layer with experts, else 0
    "total": the sum of all but the buffers
    The modules that predict further tokens (num_nextn_predict_layers) are not part of it.
    Cost: no tensor is made.
    """
    raise NotImplementedError


def count_active(cfg: DeepSeekConfig, *, input_embedding: bool = False) -> int:
    """Return how many parameters work on one token.

    Of the routed experts only num_experts_per_tok per layer do; everything else does. The table of input
    embeddings is only looked up: it counts (whole) with input_embedding=True alone. A tied table works as the
    head, and so counts always, once.
    Cost: no tensor is made.
    """
    raise NotImplementedError


def yarn_mscale(factor: float, m: float) -> float:
    """Return 0.1 * m * ln(factor) + 1, and 1.0 where factor <= 1."""
    raise NotImplementedError


def yarn_inv_freq(
    dim: int, base: float, factor: float, original_max: int, beta_fast: float = 32, beta_slow: float = 1
) -> Tensor:
    """Return the frequencies (dim/2,) of the pairs, for a context `factor` times as long as original_max.

    Pair i has the frequency f_i = base ** (-2i / dim). It turns original_max * f_i / (2 pi) times within the
    original context. Solve this for the (real) index c(n) whose pair turns n times:
        low = floor(c(beta_fast)), high = ceil(c(beta_slow)), each then kept within 0 ... dim - 1.
    Up to index low a pair keeps f_i; from index high on it has f_i / factor; in between the share of f_i / factor
    in the mixture of the two grows from 0 to 1 in proportion to the index. Where low = high, only the indices
    up to it keep f_i. factor 1 changes nothing.
    Returns float64, on the CPU: positions go up to 163,840, and the table of angles is rounded later.
    An odd dim raises ValueError with its value.
    """
    raise NotImplementedError


def rope_setup(cfg: DeepSeekConfig) -> tuple[Tensor, float, float]:
    """Return (inv_freq, cos_sin_scale, softmax_scale): what attention has to know about positions.

    inv_freq: those of `yarn_inv_freq` for the rotated width, which is qk_rope_head_dim, or the whole head
        (hidden_size / num_attention_heads) in ordinary attention
    cos_sin_scale: multiplies both tables: the `yarn_mscale` of mscale divided by that of mscale_all_dim
    softmax_scale: multiplies the scores: the width of a query head ** -0.5, times the square of the
        `yarn_mscale` of mscale_all_dim. The width is qk_nope_head_dim + qk_rope_head_dim, or the whole head.
    With rope_type "default" nothing is stretched, whatever the other fields are: plain frequencies, a
    cos_sin_scale of 1.0, and the width ** -0.5.
    """
    raise NotImplementedError


def forward_flops(cfg: DeepSeekConfig, t: int, context: int, mode: str) -> int:
    """Return the FLOPs of one forward pass: t new tokens of one sequence, `context` others in the cache before.

    Counted are the matrix products, 2*m*k*n for (m, k) times (k, n); norms, softmax, rotation, look-ups and
    sums are not. Each new token is scored against all context + t keys: masks save nothing. Each new token goes
    through all projections, the router, its num_experts_per_tok experts, the shared experts or the dense MLP,
    and the head.
    mode, for latent attention:
      "naive": the keys and values of all context + t tokens are made from their latents, in each layer
      "absorbed": none is made. In each head the query is taken into the latent space, scores are products of
          width kv_lora_rank + qk_rope_head_dim, the mixture has width kv_lora_rank and is taken out once per
          new token
      "auto": the cheaper of the two
    Any other mode raises ValueError with the mode. Ordinary attention costs the same in each of the three.
    Cost: no tensor is made.
    """
    raise NotImplementedError


def mtp_parameters(cfg: DeepSeekConfig) -> dict[str, int]:
    """Return the parameters of one module that predicts one more token ahead.

    "layer": a layer with experts as the model has it, with its two norms, without buffers
    "projection": a matrix from two rows of hidden_size to one
    "norms": three of hidden_size, for the two rows and at the end
    "total": their sum. Embedding and head are the model's own, and not counted.
    cfg has latent attention and experts; whether num_nextn_predict_layers is 0 or more plays no part.
    """
    raise NotImplementedError


def design(budget_total: int, budget_active: int, d_model: int, n_layers: int) -> DeepSeekConfig:
    """Return a relative of V2-Lite with both budgets met within 1 %.

    budget_total is the "total" of `count_parameters`, budget_active what `count_active` gives. d_model is a
    multiple of 128, n_layers at least 2.
    Fixed are: hidden_size d_model, num_hidden_layers n_layers, d_model / 128 heads (of queries and of keys), an
    intermediate_size of 4 * d_model, and all other fields as in `DeepSeekConfig.v2_lite()`.
    All sizes are ints. Free are: n_routed_experts (2 to 512), num_experts_per_tok (at least 1 and fewer than n_routed_experts) and
    moe_intermediate_size (a multiple of 128, at most 4 * d_model). Any choice that meets the budgets is right.
    If none does, ValueError with both budgets, as plain digits.
    """
    raise NotImplementedError
