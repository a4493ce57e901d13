"""Grouped-query attention of day 23 against transformers' Llama, with and without a cache."""

import pytest
import torch
from transformers.models.llama import modeling_llama as llama

from reference.day22_kv_cache import KVCache
from reference.day23_grouped_query import GroupedQueryAttention

B, T, D, HEADS, WIDTH, BASE = 2, 11, 48, 6, 16, 500000.0


def pair(groups):
    """Llama's attention with one layer's weights, and the reference with the same."""
    config = llama.LlamaConfig(
        hidden_size=D,
        num_attention_heads=HEADS,
        num_key_value_heads=groups,
        head_dim=WIDTH,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": BASE},
        attn_implementation="eager",
    )
    theirs = llama.LlamaAttention(config, 0).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5)
    mine = GroupedQueryAttention(D, HEADS, groups, head_dim=WIDTH, base=BASE, layout="half")
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine, llama.LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@torch.no_grad()
def test_outputs(groups):
    theirs, mine, rotary = pair(groups)
    x = torch.randn(B, T, D)
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    angles = rotary(x, torch.arange(T)[None])
    wanted = theirs(x, position_embeddings=angles, attention_mask=mask)[0]
    assert (mine(x) - wanted).abs().max() <= 1e-5
    cache, parts, start = KVCache(B, groups, T, WIDTH), [], 0
    for size in (4, 1, 3, 3):
        parts.append(mine(x[:, start : start + size], cache=cache))
        start += size
    assert (torch.cat(parts, 1) - wanted).abs().max() <= 1e-5
