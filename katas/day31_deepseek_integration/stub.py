"""Day 31: a DeepSeek model, and published weights in it. `kata lesson` explains, `kata check` tells you where you are.

B batch, T tokens, D model width (hidden_size), V vocabulary (vocab_size), r is kv_lora_rank and dr is qk_rope_head_dim.
A `cfg` is a DeepSeekConfig of day 29. Masks are boolean, True means may attend. Attention, caches, routers and experts are
those of days 27 to 30; what they promise about masks, positions, modes and dtypes holds here, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from day08_linear_layers import Linear  # noqa: F401 - yours, if you passed day 8, and so on
from day14_custom_modules import Embedding, Report, RMSNorm, load_renamed  # noqa: F401
from day27_mla_components import LatentCache
from day28_mla_module import MLA  # noqa: F401
from day29_deepseek_architecture import DeepSeekConfig, layer_plan, rope_setup  # noqa: F401
from day30_deepseek_components import MoE, SwiGLU  # noqa: F401
from torch import Tensor, nn


class Parity(NamedTuple):
    """How far two models are apart. Nothing to do here."""

    max_error: float  # the largest absolute difference of two logits
    changed: int  # at how many positions another token is the most likely one


def compare_logits(actual: Tensor, expected: Tensor, shown: Tensor | None = None, *, margin: float = 1e-3) -> Parity:
    """Compare logits (B, T, V) at every position, or only at those where shown (B, T) is True.

    max_error: the largest |actual - expected| over all words of all positions that count. NaN in `actual` at one of
        them makes it NaN; what stands at the others has no say, NaN or not.
    changed: the number of positions that count where the largest logit of `actual` belongs to another word than that
        of `expected`, and where `expected` was not in doubt: its largest logit leads the next by more than `margin`.
    If no position counts, the two are 0.0 and 0. V is 2 at least. max_error is a float, changed an int.

    The dtypes may differ. Differences are taken in float32 at least (two float64 tensors in float64), so nothing is
    rounded before it is compared.
    Raises ValueError with both shapes when the logits differ in shape, or when shown does not fit them.
    """
    raise NotImplementedError


class DecoderLayer(nn.Module):
    """Layer `index` of a model: x becomes h = x + attention(norm(x)), and this becomes h + ffn(norm(h)).

    cfg: its attention has a latent; if `layer_plan` says otherwise, ValueError with "kv_lora_rank" in the message
    index: from 0 to num_hidden_layers - 1; `layer_plan` knows whether the network of this layer is dense

    The parts, with the names of the checkpoints:
    - input_layernorm and post_attention_layernorm: two RMSNorm of width D, with eps rms_norm_eps
    - self_attn: the MLA of day 28. The norms of its latents have eps 1e-6, whatever rms_norm_eps is. Its frequencies,
      the factor on cos and sin and the scale of the softmax are what `rope_setup` gives
    - mlp: the MoE of day 30 in a sparse layer, else a SwiGLU with intermediate_size hidden numbers
    There are no other parameters and no biases but the router's.
    """

    def __init__(self, cfg: DeepSeekConfig, index: int):
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
        """Map x (B, T, D) to (B, T, D) in its dtype; x is not changed.

        cache, mask, positions and mode mean what they mean to `MLA`, which gets all four.
        """
        raise NotImplementedError


class DeepSeekForCausalLM(nn.Module):
    """A DeepSeek language model. `cfg` is kept as an attribute; the state dict has the names of the checkpoints.

    - model.embed_tokens.weight (V, D)
    - model.layers.{i}.*: one DecoderLayer(cfg, i) for each of num_hidden_layers
    - model.norm.weight (D,): an RMSNorm with eps rms_norm_eps, after the last layer
    - lm_head.weight (V, D): without a bias, and not the embedding. cfg.tie_word_embeddings raises ValueError with
      "tie_word_embeddings" in the message.

    Precision: the bias of a router decides between close scores. Wherever the model is cast (`.to(dtype)`,
    `.bfloat16()`, `.double()`), the buffers `e_score_correction_bias` stay float32 and keep every bit; they do move
    with the model from device to device. All methods of nn.Module that move or cast go through `_apply`.
    """

    def __init__(self, cfg: DeepSeekConfig):
        raise NotImplementedError

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        caches: list[LatentCache] | None = None,
        mode: str = "auto",
        last_only: bool = False,
    ) -> Tensor:
        """Map tokens (B, T) to logits (B, T, V): in float32, or in float64 if the model is float64.

        positions, mask and mode go to every layer; caches[i] goes to layer i.
        last_only: logits (B, 1, V) of the last position alone, with the work of a single position in the head
        No token has an influence on the logits before it.
        Raises ValueError when tokens are not (B, T), with their shape, and when there are not as many caches as layers,
        with both numbers.
        Cost: the FLOPs that `forward_flops` of day 29 predicts, plus what `dispatch` of day 30 may take for weighted
        sums; with last_only 2*D*V less for each position that is left out.
        """
        raise NotImplementedError

    def new_caches(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> list[LatentCache]:
        """Return one empty LatentCache(batch, max_len, r, dr) for each layer, no two the same.

        dtype and device are those of the model's weights unless given. Together the caches take the bytes that
        `kv_cache_bytes` of day 29 says.
        """
        raise NotImplementedError


class Skip(NamedTuple):
    """A tensor of a checkpoint that is left out on purpose. Nothing to do here."""

    why: str  # a few words for whoever reads a report


def map_keys(names: Iterable[str], cfg: DeepSeekConfig) -> dict[str, str | Skip]:
    """Return for each name of a published checkpoint the name that it feeds in DeepSeekForCausalLM(cfg), or a Skip.

    Names may lack "model." in front, as in files that were written from the part below the head:
    "layers.0.mlp.up_proj.weight" feeds "model.layers.0.mlp.up_proj.weight". All other names feed themselves, those of
    single experts included ("model.layers.3.mlp.experts.17.down_proj.weight"); "lm_head.weight" never has a "model.".

    Skipped, each with a `why` that is not empty, with "model." in front or without:
    - every tensor of a layer whose number is num_hidden_layers or larger: it predicts further ahead
    - names that end in ".rotary_emb.inv_freq": old files store what follows from the configuration

    Raises ValueError with the name, or with all names concerned, in the message when
    - a name feeds nothing in this model, and is none of the above (scales of 8-bit weights, stacked experts, ...)
    - two names feed the same tensor: both
    - a tensor of the model is fed by nothing: all of those

    By rule: no model is built and no tensor made, so that V3 with its 45,395 tensors is a matter of a second at most.
    `names` may be an iterator.
    """
    raise NotImplementedError


def read_checkpoint(directory: str | Path) -> dict[str, Tensor]:
    """Return all tensors of a folder, on the CPU, in the dtypes and with the bits of the files.

    If there is a model.safetensors.index.json, its "weight_map" (name of a tensor -> name of a file in the folder) says
    which files belong to the checkpoint. Otherwise it is model.safetensors. No other file of the
    folder has a say.

    Raises ValueError
    - with the names of both files, when the folder has neither
    - with its name, when a file of the index is missing, or when a file is cut off or otherwise no safetensors file
    - with the name of the tensor, when it is in two files (and with the names of these), when it is not in the file that
      the index says, and when the index does not know it
    """
    raise NotImplementedError


def load_pretrained(model: DeepSeekForCausalLM, tensors: Mapping[str, Tensor]) -> Report:
    """Copy a published checkpoint into `model`, whose `cfg` says what belongs there: all that it needs, or nothing.

    Names are those that `map_keys` understands. Returns a Report: `loaded` has the names of everything in the model's
    state dict, `unexpected` the names of the tensors that were skipped on purpose, `missing` and `mismatched` are empty.

    Values are copied into the parameters and buffers that are there: they stay the same objects, keep their dtype and
    device, need gradients as before, and share no memory with `tensors`. A value is rounded to the dtype of its own
    target and never before: float32 biases reach a bfloat16 model with all their bits. `tensors` is not changed.

    Raises ValueError for what `map_keys` refuses, and with name and both shapes for a tensor of another shape. Then
    nothing in the model has changed.
    Cost: no more extra bytes at one time than the largest tensor takes in the model.
    """
    raise NotImplementedError


def init_weights_(model: nn.Module, std: float, *, generator: torch.Generator) -> None:
    """Fill every parameter and every saved buffer of a model, all of which are floating point.

    A name that ends in "bias" gets zeros, every other tensor with a single axis ones (they belong to norms), and
    everything else independent numbers from N(0, std): matrices, embeddings, routers. Buffers that are not in the state
    dict keep their values.

    The numbers come from `generator` alone, which may live on another device. With the same seed they are the same, in
    whatever order the modules were registered: what counts is the names. Parameters are filled in place and need
    gradients as before.
    """
    raise NotImplementedError


def from_pretrained(
    directory: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> DeepSeekForCausalLM:
    """Return the model that a folder holds: config.json says how it is built, the checkpoint beside it fills it.

    The parameters have the given dtype (router biases stay float32, with the bits of the file) and device; None means
    where torch puts new tensors. torch's global random state is as before.
    In float32 the logits are those of transformers within 1e-4; in bfloat16 the root mean square of the difference to
    them is at most 0.03 of their own.
    What `read_checkpoint`, `map_keys` and `load_pretrained` refuse raises ValueError.
    """
    raise NotImplementedError


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of one file, read from its bytes.

    The format: 8 bytes, the length N of the header as an unsigned little-endian number; N bytes, a JSON object, perhaps
    with blanks at its end; then nothing but numbers, little-endian, without gaps. In the object each tensor has an entry
    {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, with the first byte and the one after the last, counted
    from the end of the header. "__metadata__" is no tensor. Entries may stand in any order; a shape may be [] and a
    tensor may be empty.
    dtypes: F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL.

    The tensors live on the CPU. Each has memory of its own, and any of them may be written to.

    Raises ValueError
    - when the file ends before its header does
    - with its name, for a tensor that goes on after the end of the file; that overlaps the one before it, or leaves a gap
      (or does not begin at 0, if it is the first); that has more or fewer bytes than dtype and shape take; whose dtype is
      none of the above; whose name is in the header twice
    - when bytes are left after the last tensor
    """
    raise NotImplementedError
